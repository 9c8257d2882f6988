"""The attention layer: causal self-attention with learnable sinks, sliding windows, documents and YaRN.

| file                  | what it holds                                                                       |
| --------------------- | ----------------------------------------------------------------------------------- |
| `layer.py`            | `SinkAttention`, which replaces LitGPT's `CausalSelfAttention` in a block            |
| `causal_attention.py` | attention of a whole sequence: all of it, in sliding windows, within documents       |
| `sinks.py`            | softmax attention with a sink logit per head, as a pure function                     |
| `flash.py`            | the same with flash kernels, and its gradients                                       |
| `kernels/`            | a registry of attention kernels, the choice between them, one file for each          |
| `documents.py`        | documents in a packed sequence                                                       |
| `streaming_cache.py`  | a cache of the first and last tokens, for endless generation                         |
| `cache_positions.py`  | the range of positions in a call with a cache, without waiting for a device          |
| `rope.py`             | rotary tables                                                                        |
| `rotation.py`         | the rotary embedding of queries and keys                                             |
| `gpt_forward.py`      | what the settings change in a whole model: embeddings, positions, documents          |

The fields are in `litgpt_moe_ext.config.fields`, the rules for them in `litgpt_moe_ext.config.rules`.
"""
