"""Checkpoints in the formats of other libraries.

`hf/` and `gguf/` each have a table of classes. Their shared code is here: `facts.py` describes a model by properties
that distinguish classes, `families.py` has what families of models have in common, `architecture.py` defines classes
and chooses one, `tensors.py` maps names and shapes of weights.
"""
