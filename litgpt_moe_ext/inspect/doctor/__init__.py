"""Whether this installation can run a recipe: what is there, and what it means.

Each check is a function of what it looks at; none of them trains, downloads or compiles anything.
"""
