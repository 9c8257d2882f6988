"""Activation checkpointing, the fused loss, and number formats."""

import sys

import pytest
import torch
from litgpt.utils import chunked_cross_entropy

from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.loss.linear import linear_loss
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from tests.models import initialized_model, moe_config, needs_fused_loss, noisy_config
from tests.runs import logged, run_command, train


def gradients(model, ids) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    chunked_cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("make_config", [moe_config, noisy_config])
def test_checkpointed_gradients_are_the_same(mode, make_config):
    """Bit for bit, noise and token counts included; and something is computed twice."""
    config = make_config(attention_class_name="SinkAttention")
    model = initialized_model(config)
    ids = torch.randint(0, 64, (2, 17))
    expected = gradients(model, ids)
    counts = [block.mlp.gate.tally.take() for block in model.transformer.h]
    model.zero_grad()
    calls = []
    model.transformer.h[0].mlp.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    ActivationCheckpointing(mode).on_before_setup(model)
    actual = gradients(model, ids)
    assert len(calls) == 2
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for block, count in zip(model.transformer.h, counts, strict=True):
        assert torch.equal(block.mlp.gate.tally.take(), count)


def test_selective_keeps_the_choice_of_experts():
    """`topk` runs once per router in training although the block runs twice."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        topk = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.topk += func is torch.ops.aten.topk.default
            return func(*args, **(kwargs or {}))

    counted = {}
    for mode in ("full", "selective"):
        model = initialized_model(moe_config())
        ActivationCheckpointing(mode).on_before_setup(model)
        with Count() as count:
            gradients(model, torch.randint(0, 64, (1, 9)))
        counted[mode] = count.topk
    assert counted == {"full": 4, "selective": 2}


@needs_fused_loss
def test_fused_loss_has_the_gradients_of_litgpt():
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1000)
    x = torch.randn(2, 33, 16, requires_grad=True)
    targets = torch.randint(0, 1000, (2, 33))
    targets[0, :5] = -100
    expected = chunked_cross_entropy(head(x), targets)
    wanted = torch.autograd.grad(expected, [x, head.weight, head.bias])
    actual = linear_loss(x, targets, head, x.dtype)
    got = torch.autograd.grad(actual, [x, head.weight, head.bias])
    torch.testing.assert_close(actual, expected)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@needs_fused_loss
def test_all_savers_train_alike(recipe, finished, tmp_path):
    """With accumulation, balancing bias and validation: the losses of a plain run."""
    finished(tmp_path / "plain")
    for name, extra in {
        "saving": {"fused_cross_entropy": True, "activation_checkpointing": "selective"},
        "full": {"activation_checkpointing": "full"},
    }.items():
        file = recipe(name, out_dir=str(tmp_path / name), **extra)
        assert train("--config", file, "--train.max_steps", "6", "--train.save_interval", "1000") == 0
    for column, number in (("loss", 6), ("val_loss", 1)):
        plain, saving, full = (
            list(map(float, logged(tmp_path / n, column).values()))[:number] for n in ("plain", "saving", "full")
        )
        assert len(saving) == number
        assert saving == pytest.approx(plain, abs=1e-3)
        assert full == plain


@needs_fused_loss
def test_fused_loss_scales_the_auxiliary_losses(recipe, tmp_path):
    model = {"mlp_class_name": "NoisyTopKMoE", "norm_topk_prob": None, "router_bias_update_rate": None}
    for name, fused in (("plain", False), ("fused", True)):
        changes = {"model_config": model, "fused_cross_entropy": fused, "train": {"max_tokens": 4 * 128}}
        file = recipe(name, out_dir=str(tmp_path / name), **changes)
        assert train("--config", file) == 0
    plain, fused = (list(map(float, logged(tmp_path / n, "grad_norm").values())) for n in ("plain", "fused"))
    assert fused == pytest.approx(plain, rel=1e-2)


PEAK = """
import sys, torch
from litgpt.utils import chunked_cross_entropy
from litgpt_moe_ext.loss.linear import linear_loss
from litgpt_moe_ext.training.callbacks.telemetry import peak_memory_gb
head = torch.nn.Linear(64, 49152, bias=False)
x, targets = torch.randn(1, 2048, 64, requires_grad=True), torch.randint(0, 49152, (1, 2048))
before = peak_memory_gb(x.device)
loss = linear_loss(x, targets, head, x.dtype) if sys.argv[1] == "fused" else chunked_cross_entropy(head(x), targets)
loss.backward()
print((peak_memory_gb(x.device) - before) * 1e9 / 2**20)
"""


@needs_fused_loss
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process inherits the peak of the one that started it")
def test_fused_loss_needs_a_fraction_of_the_memory():
    """2048 tokens, 49,152 words: peak MiB of LitGPT's loss and of the fused one, each in a fresh process."""
    peaks = {}
    for kind in ("plain", "fused"):
        peaks[kind] = float(run_command(sys.executable, "-c", PEAK, kind).stdout.split()[-1])
    assert peaks["fused"] < 0.4 * peaks["plain"], peaks


def test_half_precision_with_a_scaler(recipe, tmp_path):
    """16-mixed on a CPU: the scale is part of the checkpoint, and a resumed run is exact."""
    for name, arguments in (("whole", []), ("parts", ["--train.max_steps", "4"])):
        file = recipe(name, out_dir=str(tmp_path / name), precision="16-mixed", train={"max_tokens": 8 * 128})
        assert train("--config", file, *arguments) == 0
    saved = torch.load(tmp_path / "parts" / "final" / "lit_model.pth", weights_only=True)
    assert saved["callbacks"]["ScalerState"]["scale"] > 1
    assert train("--config", file, "--resume", "auto") == 0
    losses = logged(tmp_path / "whole", "loss")
    assert logged(tmp_path / "parts", "loss") == losses
    values = list(map(float, losses.values()))
    assert values[-1] < values[0] - 0.2
    # So few steps leave the scale where it began; another one comes back as well.
    saved["callbacks"]["ScalerState"]["scale"] = 1024.0
    changed = tmp_path / "parts" / "step-00000004"
    torch.save(saved, changed / "lit_model.pth")
    checksums.write(changed)
    further = ("--train.max_steps", "5", "--out_dir", tmp_path / "other")
    assert train("--config", file, "--resume", changed, *further) == 0
    final = torch.load(tmp_path / "other" / "final" / "lit_model.pth", weights_only=True)
    assert final["callbacks"]["ScalerState"]["scale"] == 1024.0


def test_matmul_precision(recipe, monkeypatch):
    """It holds for the run, not for the next one of the process."""
    before, set_precision, chosen = torch.get_float32_matmul_precision(), torch.set_float32_matmul_precision, []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda to: (chosen.append(to), set_precision(to)))
    assert train("--config", recipe(train={"max_tokens": 128}), "--float32_matmul_precision", "medium") == 0
    assert chosen == ["medium", before]
    assert torch.get_float32_matmul_precision() == before
