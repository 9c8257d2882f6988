"""What a model costs before it is trained, and what its experts do afterwards.

Importing the package loads nothing; `litgpt_moe_ext.console` offers its parts as commands.
"""
