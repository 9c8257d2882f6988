"""The device that a run trains on."""

import pytest
import torch

from litgpt_moe_ext.inspect.doctor.installation import devices
from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision, unused_gpu
from tests.runs import train


def test_turing_trains_in_float16(monkeypatch):
    """torch counts GPUs that only emulate bfloat16; there float16 is the fast one."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert default_precision("cuda") == "16-mixed"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert default_precision("cuda") == "bf16-mixed"
    assert default_precision("cpu") == "32-true"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that makes this a machine with a driver or without, whose torch was built for some CUDA."""

    def make(driver: bool, cuda: str | None, available: bool = False) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        if driver:
            (tmp_path / "bin" / "nvidia-smi").touch(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)

    return make


def test_a_gpu_that_torch_cannot_use_has_a_remedy(machine, monkeypatch):
    """Torch on the package index has no CUDA for Windows, and nothing else would say so."""
    machine(driver=False, cuda=None)
    assert unused_gpu() is None
    assert [found.text for found in devices()][1:] == [
        "none that torch can use; everything runs on the CPU: torch was built without CUDA"
    ]
    machine(driver=True, cuda=None)
    assert "torch was built without CUDA" in unused_gpu()
    assert "--torch-backend=auto" in unused_gpu()
    assert [found.text.partition(": ")[2] for found in devices()][1:] == [unused_gpu()]
    machine(driver=True, cuda="13.0")
    assert unused_gpu() == "torch was built for CUDA 13.0, for which the driver may be too old"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert unused_gpu().startswith(
        "CUDA_VISIBLE_DEVICES is '7', which may name none of its GPUs; or torch was built for"
    )
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert unused_gpu() is None, "as somebody wants it"
    machine(driver=True, cuda="13.0", available=True)
    assert unused_gpu() is None


def test_a_run_says_that_it_leaves_the_gpu_alone(recipe, monkeypatch, capsys):
    monkeypatch.setattr("litgpt_moe_ext.training.phases.report.unused_gpu", lambda: "it sleeps")
    assert train("--config", recipe(train={"max_tokens": 128})) == 0
    said = "The GPU of this machine is not used: it sleeps" in capsys.readouterr().out
    assert said == (accelerator_here() == "cpu")
