"""Models as Hugging Face checkpoints: which class computes the same, under which names, written how.

`architectures` is the table of classes, `names` maps tensors, `shards` writes files, `write` puts a directory together;
`read` goes the other way, with what `published/` makes of a directory. `modeling_litgpt_moe.py` is copied beside the
weights of models that no class of transformers computes.
"""
