"""The command `litgpt-moe`. One module per sub-command, with its arguments as a function's signature.

These modules import nothing heavy at their top, so that help and wrong arguments are answered at once.
"""
