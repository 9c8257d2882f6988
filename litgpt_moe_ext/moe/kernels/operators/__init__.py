"""What a layer of experts computes as torch operators: what a compiler, meta tensors and a FLOP counter see.

| file            | what it holds                                                              |
| --------------- | -------------------------------------------------------------------------- |
| `up.py`         | `expert_up`, from tokens to hidden rows, and its backward pass             |
| `down.py`       | `expert_down`, from hidden rows to tokens, and its backward pass           |
| `parts.py`      | the operators that both backward passes are made of                        |
| `engines.py`    | who computes them                                                          |
| `few_tokens.py` | `decode_experts`, both projections for a handful of tokens                 |
| `shared.py`     | the activation of shared experts, and their sum with the routed ones       |

Between forward and backward, operators keep their own inputs: the tokens, the output of the first projection, the
routing. Parameters are kept as they are stored, and cast again unless passes share their casts
(`litgpt_moe_ext.moe.kernels.step_weights`).
"""
