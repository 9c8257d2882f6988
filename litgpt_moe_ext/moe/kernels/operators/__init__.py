"""The computations of a layer of experts as torch operators, visible to compilers, meta tensors and FLOP counters.

| file            | what it holds                                                              |
| --------------- | -------------------------------------------------------------------------- |
| `up.py`         | `expert_up`, from tokens to hidden rows, and its backward pass             |
| `down.py`       | `expert_down`, from hidden rows to tokens, and its backward pass           |
| `parts.py`      | the operators that both backward passes are made of                        |
| `engines.py`    | the modules that compute them                                              |
| `few_tokens.py` | `decode_experts`, both projections for a handful of tokens                 |
| `shared.py`     | the activation of shared experts, and their sum with the routed ones       |

Operators keep their inputs for the backward pass: the tokens, the output of the first projection, the routing.
Parameters are kept in the dtype in which they are stored and cast again, unless passes share their casts
(`litgpt_moe_ext.moe.kernels.step_weights`).
"""
