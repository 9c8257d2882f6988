"""How kernels are started."""

import pytest
import torch

from litgpt_moe_ext.kernels import launch as launches
from litgpt_moe_ext.kernels.launch import launch


def test_an_empty_grid_starts_nothing():
    """CUDA refuses one."""
    launch(None, (3, 0), (), warps=4)


@pytest.mark.parametrize(
    ("installed", "chip", "capability", "works"),
    [
        (True, None, (9, 0), True),
        (True, None, (7, 5), True),
        (True, None, (7, 0), False),
        (False, None, (9, 0), False),
        (True, "gfx942", None, True),
        (True, "gfx900", None, False),
        (False, "gfx942", None, False),
    ],
)
def test_on_which_cards_triton_works(installed, chip, capability, works, monkeypatch):
    """If it is there, which on Windows it need not be."""
    monkeypatch.setattr(launches, "triton_installed", lambda: installed)
    monkeypatch.setattr(torch.version, "hip", chip and "6.4")
    monkeypatch.setattr(launches, "amd_chip", lambda device: chip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launches.triton_works_on.__wrapped__(torch.device("cuda")) == works
