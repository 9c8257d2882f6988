"""Rows of token ids on their way from the data to the layers: their copy in host memory, and which ids are padding."""
