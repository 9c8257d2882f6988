"""Tokenizers of corpora: training, importing, and opening them for documents.

A tokenizer directory holds the two files that LitGPT copies beside every checkpoint and that `transformers` reads as
well: `tokenizer.json` and `tokenizer_config.json`. This package needs neither of the two libraries.
"""
