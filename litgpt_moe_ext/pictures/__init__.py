"""The common style of all pictures, and the picture of the experts' load.

`training` logs that picture during a run, and `inspect` draws it from logs afterwards.
"""
