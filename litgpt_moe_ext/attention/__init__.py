"""The attention layer: causal self-attention with learnable sinks, sliding windows and YaRN.

| file            | what it holds                                                                        |
| --------------- | ------------------------------------------------------------------------------------ |
| `layer.py`      | `SinkAttention`, which takes the place of LitGPT's `CausalSelfAttention` in a block   |
| `sinks.py`      | softmax attention with a sink logit per head, as a pure function                      |
| `window.py`     | sliding windows: the work and the masks                                               |
| `rope.py`       | rotary tables                                                                         |
| `validation.py` | what a configuration may say, checked without importing torch                         |
"""
