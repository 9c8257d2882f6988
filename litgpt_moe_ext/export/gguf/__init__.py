"""Models as GGUF files, for llama.cpp and everything built on it.

`architectures` is the table of llama.cpp's graphs and what each computes, `names` maps tensors, `tokenizer` writes the
vocabulary, `write` writes the file. Graphs are compared by the facts of `export/facts.py`.
"""
