"""Tokenizers of corpora: trained, brought along, opened for documents.

A tokenizer directory holds the two files that LitGPT copies beside every checkpoint and that `transformers` reads as
well: `tokenizer.json` and `tokenizer_config.json`. This room needs neither of the two libraries.
"""
