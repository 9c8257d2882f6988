"""Print, as JSON, what MoE layers start on the null GPU, and how often the host waits: run by a test, on that GPU."""

import ctypes
import json
import os
import sys

import torch

import litgpt_moe_ext  # noqa: F401  # registers the layers
from tests.models import moe_config
from tests.moe.test_launches import make_layer

_gpu = ctypes.CDLL(os.environ["LD_PRELOAD"])
_gpu.null_gpu_names.restype = ctypes.c_char_p
_gpu.null_gpu_waited.restype = ctypes.c_long


def _started() -> list[str]:
    names = _gpu.null_gpu_names().decode().split("\n")[:-1]
    _gpu.null_gpu_trace(1)
    return names


def count(settings: dict, padded: bool) -> dict:
    """Return the names of what a layer starts in its passes, and how often they waited.

    Args:
        settings: Of the model.
        padded: Whether there may be padding.
    """
    moe, inputs = make_layer(moe_config(**settings), padded)
    upstream = torch.zeros_like(inputs[0], dtype=torch.bfloat16)
    for _ in range(2):  # what is made once is made in the first
        waited = _gpu.null_gpu_waited()
        _gpu.null_gpu_trace(1)
        with torch.autocast("cuda", torch.bfloat16):
            y = moe(*inputs)
        forward = _started()
        y.backward(upstream)
        backward = _started()
        _gpu.null_gpu_trace(0)
        waited = _gpu.null_gpu_waited() - waited
    return {"forward": forward, "backward": backward, "waited": waited}


if __name__ == "__main__":
    print(json.dumps([count(settings, padded) for settings, padded in json.load(sys.stdin)]), flush=True)
    # Autograd's thread may still let go of Python's objects, which does not go together with Python's own end.
    os._exit(0)
