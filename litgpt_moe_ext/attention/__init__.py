"""The attention layer: causal self-attention with learnable sinks, sliding windows, documents and YaRN.

| file            | what it holds                                                                        |
| --------------- | ------------------------------------------------------------------------------------ |
| `layer.py`      | `SinkAttention`, which takes the place of LitGPT's `CausalSelfAttention` in a block   |
| `causal.py`     | attention of a whole sequence: all of it, in windows, within documents                |
| `sinks.py`      | softmax attention with a sink logit per head, as a pure function                      |
| `backends.py`   | which kernel computes it: what each one can do, and who chooses                       |
| `kernels.py`    | the kernels, behind one signature                                                     |
| `window.py`     | sliding windows: the work and the masks                                               |
| `documents.py`  | documents in a packed sequence                                                        |
| `streaming.py`  | a cache of the first and the last tokens, for generation without end                  |
| `positions.py`  | what is known about positions without waiting for a device                            |
| `rope.py`       | rotary tables                                                                         |
| `model.py`      | what the settings change in a whole model: embeddings, positions, documents           |
| `validation.py` | the fields, and what a configuration may say in them, checked without importing torch |
"""
