"""Tests that need a card: `pytest tests/gpu -m gpu`, under eight minutes on one. Without a card they are skipped.

`GPU_TESTS_DEVICE=cpu` runs the same code on a CPU at small sizes, to see that nothing but the card is missing.
"""

import os

import pytest
import torch
import torch.distributed as dist

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")


@pytest.fixture
def device() -> torch.device:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(DEVICE)


@pytest.fixture
def tiny(device) -> bool:
    """Whether sizes must be small."""
    return device.type == "cpu"


@pytest.fixture
def one_process(device):
    """A process group of this process alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
