"""Models as Hugging Face checkpoints: the class that computes the same, its names of tensors, and its files.

`architectures` is the table of classes, `names` maps tensors, `shards` writes files, `write` writes a directory; `read`
goes the other way, through `published/`. `modeling_litgpt_moe.py` is copied next to the weights of models that no class
of transformers computes.
"""
