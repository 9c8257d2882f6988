"""How routed experts are computed: backends behind one signature, the choice among them, and other kernels of a layer.

Backends and their choice are in the same files as those of attention (`litgpt_moe_ext.attention.kernels`):

| file          | what it holds                                                               |
| ------------- | --------------------------------------------------------------------------- |
| `backend.py`  | what a backend is, and where it is preferred, as plain data                 |
| `own.py`      | the backends of this package: what each can do, and which is preferred where |
| `registry.py` | all backends by name; `register_backend`                                    |
| `choice.py`   | which backend computes the experts of a layer                               |
| `calls.py`    | what a backend is called with, and what it must return                      |

`loop.py`, `cpu.py` and `grouped.py` are the package's own backends.
"""
