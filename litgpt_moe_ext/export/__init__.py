"""Checkpoints in the formats of others.

`hf/` and `gguf/` have a table of classes each. What both need is here: `facts.py` describes a model in the terms that
tell classes apart, `families.py` says what families of models have in common, `architecture.py` what a class is and how
one is chosen, `tensors.py` how names and shapes of weights are mapped.
"""
