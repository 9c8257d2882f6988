"""What the tests of several files ask of a card."""

import contextlib

import pytest
import torch


@contextlib.contextmanager
def no_waits(device):
    """On a card, fail in the scope where the host waits for it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def require_bfloat16(device):
    """Skip a test where a card has no bfloat16."""
    # Turing and older emulate it, one number at a time: the plugin trains in float16 there, which is tested beside it.
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("bfloat16 needs a card of compute capability 8.0; this one trains in float16")
