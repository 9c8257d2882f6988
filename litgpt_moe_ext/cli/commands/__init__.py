"""The commands of `litgpt-moe`: dataclasses of their arguments with the method `run`.

These modules import nothing heavy at their top, so that help and wrong arguments are answered at once.
"""
