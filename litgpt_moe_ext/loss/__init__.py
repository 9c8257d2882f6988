"""The loss of a language model on GPUs, from logits or from the input of the output head."""
