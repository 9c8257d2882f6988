"""What a model costs before it is trained, and what its experts do afterwards.

Importing the package loads nothing; `litgpt_moe_ext.cli.commands` offers its parts as commands.
"""
