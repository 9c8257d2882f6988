"""Pages of the documentation that are made from the code: a hook of mkdocs.

`<!-- table: NAME -->` in a page becomes the table of that name; `benchmarks/RESULTS.md` becomes a page of the reference.
"""
