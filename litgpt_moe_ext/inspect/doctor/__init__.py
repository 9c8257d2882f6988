"""Checks whether this installation can run a recipe.

Each check is a function of what it examines; none of them trains, downloads or compiles anything.
"""
