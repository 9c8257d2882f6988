"""How kernels are started."""

import re
import subprocess
from types import SimpleNamespace

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


class _Failing:
    """Triton's driver on a machine where it cannot be set up."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    @property
    def active(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Failed to find C compiler. Please specify"), "there is none; install gcc, or name one in CC"),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "driver.c"]), "by /usr/bin/gcc, .*headers"),
        (PermissionError(13, "Permission denied", "/root/.triton"), r"\(/root/.triton: Permission denied\); set"),
        (AssertionError("libcuda.so is not\nthere"), "^Triton cannot be set up: libcuda.so is not there$"),
    ],
)
def test_what_keeps_triton_from_working_is_named(error, said, monkeypatch):
    """A slim container has no C compiler, with which Triton compiles its own code when it first looks for a GPU."""
    runtime = pytest.importorskip("triton.runtime")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(runtime, "driver", _Failing(error))
    assert re.search(said, launches._setup_obstacle.__wrapped__())
    monkeypatch.setattr(launches, "_setup_obstacle", lambda: "no compiler")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        assert launches.triton_works_on.__wrapped__(torch.device("cuda")) != used


def test_triton_that_can_be_set_up_works(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(runtime, "driver", SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: None)))
    assert launches._setup_obstacle.__wrapped__() is None
