"""Speed and utilization by hand."""

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from litgpt_moe_ext.model_size import count_flops, count_parameters
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.callbacks import telemetry
from litgpt_moe_ext.training.callbacks.telemetry import Telemetry, peak_memory_gb
from litgpt_moe_ext.training.fabric import TrainingFabric
from litgpt_moe_ext.training.gpu_peaks import peak_flops
from tests.models import moe_config
from tests.runs import logged, run_command, train


def test_utilization_by_hand(monkeypatch):
    """1000 tokens of 3 MFLOP in 2 s on two devices of 1 GFLOP/s each: three quarters."""
    clock = iter((10.0, 12.0, 13.0))
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: next(clock))
    meter = Telemetry(torch.device("cpu"), world_size=2, peak_flops=1e9)
    meter.on_flops_counted(3e6)
    first = {"loss": 1.0, "total_tokens": 500}
    meter.on_log(first)
    assert "mfu" not in first
    for waited in (0.4, 0.1):
        meter.on_batch(torch.empty(0), waited=waited)
    second = {"loss": 1.0, "total_tokens": 1500}
    meter.on_log(second)
    assert second["tokens_per_second"] == 500
    assert second["mfu"] == 0.75
    assert second["data_wait"] == 0.25
    third = {"loss": 1.0, "total_tokens": 1600}
    meter.on_log(third)
    assert (third["tokens_per_second"], third["data_wait"]) == (100, 0), "since the line before"


def test_the_utilization_of_litgpt_is_not_logged():
    """Its peaks are wrong for some GPUs."""

    class Notes(Callback):
        def on_logged(self, metrics):
            seen.append(metrics)

    seen, logger = [], mock.Mock()
    fabric = TrainingFabric(show=print, accelerator="cpu", devices=1, callbacks=[Notes()], loggers=[logger])
    fabric.log_dict({"loss": 1.0, "device/mfu": 0.1})
    assert seen[0].keys() == logger.log_metrics.call_args.kwargs["metrics"].keys() == {"loss", "ppl"}


def test_none_without_a_peak():
    meter = Telemetry(torch.device("cpu"), 1, None)
    meter.on_flops_counted(3e6)
    for tokens in (1, 2):
        metrics = {"loss": 1.0, "total_tokens": tokens}
        meter.on_log(metrics)
    assert "tokens_per_second" in metrics
    assert "mfu" not in metrics


def test_memory_of_this_run_alone(monkeypatch):
    """Of several in a process, each begins with what there is: a notebook may have trained a larger model before."""
    peak = {"cuda": 5e9}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[device.type])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update({device.type: 1e9}))
    metrics = {"loss": 1.0, "total_tokens": 1}
    Telemetry(torch.device("cuda"), 1, None).on_log(metrics)
    assert metrics["memory_gb"] == 1.0


def test_training_costs_three_times_the_active_products():
    """Forward once, backward twice (towards inputs and weights): 6 per active weight and token, plus attention."""
    config = moe_config()
    D, F, E, K, T, V, layers = 16, 12, 8, 2, 32, 64, 2
    weights = layers * (D * (16 + 2 * 8) + D * D + D * E + K * 3 * D * F) + D * V
    attention = layers * 2 * 2 * T * D
    assert count_flops(config, T, training=True) == T * 3 * (2 * weights + attention)
    size = count_parameters(config)
    assert size.total - size.active == layers * (E - K) * 3 * D * F


def test_in_a_run(recipe, tmp_path, capsys):
    """For the sequences that are trained on, not for the longest; without a peak nothing is logged on a CPU."""
    file = recipe(train={"max_seq_length": 16})
    assert train("--config", file, "--out_dir", tmp_path / "unknown", "--train.max_steps", "2") == 0
    assert logged(tmp_path / "unknown", "mfu") == {}
    assert train("--config", file, "--peak_tflops", "0.5") == 0
    assert "MFU" in capsys.readouterr().out
    speeds = {step: float(speed) for step, speed in logged(tmp_path / "out", "tokens_per_second").items()}
    utilization = {step: float(mfu) for step, mfu in logged(tmp_path / "out", "mfu").items()}
    from litgpt import Config

    config = Config.from_file(tmp_path / "out" / "final" / "model_config.yaml")
    per_token = count_flops(config, 16, training=True) / 16
    assert utilization == {step: pytest.approx(per_token * speed / 0.5e12) for step, speed in speeds.items()}
    device = [logged(tmp_path / "out", f"device/{what}_per_sec").values() for what in ("flops", "batches")]
    for flops, batches in zip(*device, strict=True):
        assert float(flops) / float(batches) == pytest.approx(2 * 16 * per_token)  # of LitGPT, for a micro-batch


@pytest.mark.parametrize(
    ("device", "precision", "matmul", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", "ieee", 312.0),
        ("NVIDIA A100-SXM4-80GB", "32-true", "ieee", 19.5),
        ("NVIDIA A100-SXM4-80GB", "32-true", "tf32", 156.0),
        ("NVIDIA H100 80GB HBM3", "bf16-true", "ieee", 989.4),
        ("NVIDIA H100 PCIe", "bf16-true", "ieee", 756.0),
        ("NVIDIA H200", "16-mixed", "ieee", 989.4),
        ("Tesla T4", "16-mixed", "ieee", 65.0),
        ("Tesla T4", "bf16-mixed", "ieee", None),
        ("NVIDIA A10G", "bf16-mixed", "ieee", 70.0),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", "ieee", 165.2),
        ("NVIDIA GeForce RTX 4090", "32-true", "tf32", 82.6),
        ("NVIDIA GeForce RTX 3060", "bf16-mixed", "ieee", 25.5),
        ("NVIDIA GeForce RTX 3090", "bf16-mixed", "ieee", 71.2),
        ("NVIDIA GeForce RTX 5090", "bf16-mixed", "ieee", 209.5),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "16-mixed", "ieee", 88.2),
        ("NVIDIA GeForce RTX 2080 Ti", "16-mixed", "ieee", 53.8),
        ("NVIDIA GeForce RTX 2080 Ti", "32-true", "tf32", 13.45),
        ("NVIDIA GeForce RTX 2080 Ti", "32-true", "ieee", 13.45),
        ("NVIDIA GeForce RTX 2080 Ti", "bf16-mixed", "ieee", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", "ieee", None),
        ("NVIDIA GH200 480GB", "bf16-mixed", "ieee", 989.4),
        ("NVIDIA GeForce RTX 2070 SUPER", "16-mixed", "ieee", 36.2),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "16-mixed", "ieee", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16-mixed", "ieee", None),
        ("Tesla V100-SXM2-16GB", "16-mixed", "ieee", None),
        ("NVIDIA GeForce GTX 1080", "32-true", "ieee", None),
    ],
)
def test_peaks(device, precision, matmul, tflops):
    assert peak_flops(device, precision, matmul) == (None if tflops is None else tflops * 1e12)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/self/status")
def test_a_system_that_does_not_say(monkeypatch):
    """gVisor has no VmHWM: no figure, and no error at the first log line."""
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"Name:\tpython\nVmRSS:\t  100 kB\n")
    assert peak_memory_gb(torch.device("cpu")) is None
    name = "ä" * 8  # of which Linux keeps 15 bytes, with half of a letter
    status = b"Name:\t" + name.encode()[:15] + b"\nVmPeak:\t 9 kB\nVmHWM:\t  2000000 kB\n"
    monkeypatch.setattr(Path, "read_bytes", lambda path: status)
    assert peak_memory_gb(torch.device("cpu")) == 2.048


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process inherits the peak of the one that started it")
def test_memory_is_that_of_this_process():
    """Not what the process that started it once took."""
    block = b"x" * 400_000_000
    code = (
        "import torch; from litgpt_moe_ext.training.callbacks.telemetry import peak_memory_gb;"
        "print(peak_memory_gb(torch.device('cpu')))"
    )
    theirs = float(run_command(sys.executable, "-c", code).stdout)
    ours = peak_memory_gb(torch.device("cpu"))
    assert 0.05 < theirs < ours - 0.1
    assert ours > len(block) / 1e9
