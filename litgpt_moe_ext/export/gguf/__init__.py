"""Models as GGUF files, which llama.cpp and everything built on it read.

`architectures` is the table of llama.cpp's graphs and what each computes, `names` maps tensors, `tokenizer` writes the
vocabulary, `write` puts a file together. The facts that graphs are compared by are those of `export/facts.py`.
"""
