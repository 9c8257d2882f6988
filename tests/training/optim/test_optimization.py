"""Schedule, parameter groups, gradient guard and weight average in whole runs."""

import json
import re
import weakref
from types import SimpleNamespace

import pytest
import torch

from litgpt_moe_ext.moe.balancing.gradient_injection import present_scale, remember_scale
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from litgpt_moe_ext.training.callbacks import ema
from litgpt_moe_ext.training.callbacks.anomalies import GradientGuard
from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.settings import AnomalyArgs, EmaArgs
from tests.models import moe_config, randomize
from tests.runs import ROOT, logged, train, validation_fell_by, weights_of

MUON = "litgpt_moe_ext.training.optim.muon.MuonAdamW"


def test_rates_follow_optimizer_steps(recipe, tmp_path):
    """With and without accumulation the same rates, none of them 0, and the router's is the given part of them."""
    for name, micro in (("one", 4), ("four", 1)):
        file = recipe(
            name,
            out_dir=str(tmp_path / name),
            train={"micro_batch_size": micro, "lr_warmup_steps": 4, "min_lr": 1e-3},
            schedule={"name": "linear"},
            parameter_groups={"router_lr_factor": 0.25, "no_weight_decay": ["norms"]},
        )
        assert train("--config", file) == 0
    one, four = (list(map(float, logged(tmp_path / n, "learning_rate").values())) for n in ("one", "four"))
    assert one == four
    assert one[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert one[-1] == pytest.approx(1e-2 - 9e-3 * 7 / 8)
    groups = torch.load(tmp_path / "one" / "final" / "lit_model.pth", weights_only=True)["optimizer"]["param_groups"]
    assert sorted(group["lr"] / one[-1] for group in groups) == pytest.approx([0.25, 1.0, 1.0])
    assert all(group["fused"] for group in groups), "the CPU has a fused AdamW"


def test_everything_at_once_resumes_exactly(recipe, tmp_path):
    """Muon, OneCycle, spike detection and a weight average: interrupted after 6 of 12 steps, nothing changes."""
    changes = {
        "schedule": {"name": "onecycle"},
        "optimizer": {"class_path": MUON, "init_args": {"lr": 1e-2}},
        "parameter_groups": {"no_weight_decay": ["norms", "embeddings"], "router_lr_factor": 0.5},
        "anomaly": {"spike_factor": 1.2, "window": 3},
        "ema": {"decay": 0.8},
    }
    whole = recipe("whole", out_dir=str(tmp_path / "whole"), **changes)
    parts = recipe("parts", out_dir=str(tmp_path / "parts"), **changes)
    assert train("--config", whole) == 0
    assert train("--config", parts, "--train.max_steps", "6") == 0
    assert train("--config", parts, "--resume", "auto") == 0
    for column in ("loss", "learning_rate", "grad_norm"):
        assert logged(tmp_path / "parts", column) == logged(tmp_path / "whole", column)
    assert validation_fell_by(0.05, tmp_path / "whole")
    for folder in ("final", "final/ema"):
        ours, theirs = weights_of(tmp_path / "parts" / folder), weights_of(tmp_path / "whole" / folder)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    skipped = torch.load(tmp_path / "whole" / "final" / "lit_model.pth", weights_only=True)["callbacks"]
    assert 0 < skipped["GradientGuard"]["skipped"] < 6


def test_weight_average(recipe, tmp_path):
    """The average is the recursion over the weights after each step, and a checkpoint that LitGPT opens."""
    file = recipe(train={"save_interval": 1, "max_tokens": 4 * 128}, ema={"decay": 0.5})
    assert train("--config", file) == 0
    steps = [weights_of(tmp_path / "out" / f"step-{step:08d}") for step in range(1, 5)]
    average = weights_of(tmp_path / "out" / "step-00000001" / "ema")
    for step in steps[1:]:
        average = {name: 0.5 * value + 0.5 * step[name] for name, value in average.items()}
    saved = weights_of(tmp_path / "out" / "final" / "ema")
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value)
    assert any(not torch.equal(saved[name], steps[-1][name]) for name in saved)
    from litgpt import LLM

    assert isinstance(LLM.load(str(tmp_path / "out" / "final" / "ema")).generate("def ", max_new_tokens=3), str)


def test_the_average_of_narrow_weights_is_wide(tmp_path):
    """In bfloat16 it would stop moving."""
    module = torch.nn.Linear(1, 1, bias=False).bfloat16()
    average = ema.WeightAverage(EmaArgs(decay=0.999))
    average.on_after_setup(SimpleNamespace(is_global_zero=True), module)
    torch.nn.init.ones_(module.weight)
    average.on_fit_begin(None)
    torch.nn.init.constant_(module.weight, 2.0)
    average.on_after_optimizer_step(None, None)
    average.on_checkpoint_staged(tmp_path)
    assert weights_of(tmp_path / "ema")["weight"].item() == pytest.approx(1.001)


def test_shards_of_the_average_are_gathered_one_after_the_other(monkeypatch, tmp_path):
    """Together they may be more than a GPU has room for."""
    gathered = []

    class Whole:
        def cpu(self):
            return torch.ones(2)

    class Shard:
        def full_tensor(self):
            assert all(earlier() is None for earlier in gathered)
            whole = Whole()
            gathered.append(weakref.ref(whole))
            return whole

    monkeypatch.setattr(ema, "is_shard", lambda tensor: isinstance(tensor, Shard))
    average = ema.WeightAverage(EmaArgs(decay=0.9))
    average._fabric = SimpleNamespace(is_global_zero=True)
    average._average = {name: Shard() for name in "abc"}
    average.on_checkpoint_staged(tmp_path)
    assert len(gathered) == 3
    assert weights_of(tmp_path / "ema").keys() == {"a", "b", "c"}


def poison(monkeypatch, steps: set[int]) -> None:
    """Make the gradients of some optimizer steps (from 1) infinite."""
    import litgpt.pretrain

    original = litgpt.pretrain.chunked_cross_entropy
    calls = {"training": 0}

    def loss(logits, targets, *args, **kwargs):
        value = original(logits, targets, *args, **kwargs)
        if not value.requires_grad or logits.is_meta:
            return value
        calls["training"] += 1
        return value * float("inf") if (calls["training"] + 1) // 2 in steps else value

    monkeypatch.setattr(litgpt.pretrain, "chunked_cross_entropy", loss)


def test_stops_before_the_weights_are_lost(recipe, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {6})
    assert train("--config", recipe()) == 1
    error = capsys.readouterr().err
    assert "Stopped: in step 6 the gradient norm is nan" in error or "the gradient norm is inf" in error
    assert "anomaly.on_nonfinite skip" in error
    saved = torch.load(tmp_path / "out" / "anomalies" / "step-00000006-rank-0.pt", weights_only=True)
    page = (ROOT / "docs" / "how-to" / "resume.md").read_text()
    assert [key for key in saved if f"`{key}`" not in page] == []
    assert (saved["step"], saved["iteration"], len(saved["batches"])) == (5, 10, 2)
    assert saved["data"]["position"] == 10
    assert saved["batches"][0].shape == (2, 33)
    assert json.loads((tmp_path / "out" / "step-00000004" / "training_state.json").read_text())["step"] == 4


def test_skips_and_goes_on(recipe, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {6, 7})
    assert train("--config", recipe(train={"save_interval": 1}), "--anomaly.on_nonfinite", "skip") == 0
    assert "step 6 is skipped" in capsys.readouterr().out
    before, after, later = (weights_of(tmp_path / "out" / f"step-{step:08d}") for step in (5, 7, 8))
    assert all(torch.equal(before[name], after[name]) for name in before), "balancing bias included"
    assert not all(torch.equal(after[name], later[name]) for name in after)
    assert all(tensor.isfinite().all() for tensor in later.values())


def test_too_many_skips(recipe, monkeypatch, capsys):
    poison(monkeypatch, set(range(3, 13)))
    arguments = ("--anomaly.on_nonfinite", "skip", "--anomaly.max_consecutive", "3")
    assert train("--config", recipe(), *arguments) == 1
    assert "3 steps in a row were skipped" in capsys.readouterr().err


class TestGuard:
    def guard(self, tmp_path, **settings) -> GradientGuard:
        guard = GradientGuard(AnomalyArgs(**settings), tmp_path, 0, print)
        guard.on_step_begin({"train_dataloader": [], "step_count": 3, "iter_num": 3})
        return guard

    def judge(self, guard: GradientGuard, norm: float, scaled: bool = False) -> bool:
        """Return whether the step is left out."""
        parameter = torch.nn.Parameter(torch.ones(1))
        parameter.grad = torch.ones(1)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        guard.on_gradients_clipped(torch.tensor(norm), torch.nn.Linear(1, 1), optimizer, scaled)
        return parameter.grad is None

    def test_spikes_are_relative_to_the_median(self, tmp_path):
        guard = self.guard(tmp_path, spike_factor=2.0, window=3)
        norms = (1.0, 9.0, 1.0, 2.1, 1.9, 3.0, 3.0, 5.0)
        assert [self.judge(guard, norm) for norm in norms] == [n in (2.1,) for n in norms]
        resumed = self.guard(tmp_path, spike_factor=2.0, window=3)
        resumed.load_state_dict(guard.state_dict())
        assert self.judge(resumed, 7.0), "the norms of a checkpoint count"
        assert [self.judge(guard, 20.0) for _ in range(4)] == [True, True, False, False], "what lasts is usual"

    def test_a_batch_that_cannot_be_saved_ends_nothing(self, tmp_path, capsys):
        (tmp_path / "anomalies").touch()
        assert self.judge(self.guard(tmp_path, on_nonfinite="skip"), float("inf"))
        assert re.search(r"its batch is not in .*\.pt, which could not be written \(", capsys.readouterr().out)

    def test_a_step_in_between_begins_the_row_anew(self, tmp_path):
        """A resumed run goes on with the row of its checkpoint."""
        guard, resumed = (self.guard(tmp_path, on_nonfinite="skip", max_consecutive=2) for _ in range(2))
        for norm in (float("inf"), 1.0, float("inf")):
            self.judge(guard, norm)
        resumed.load_state_dict(guard.state_dict())
        assert resumed.skipped == 2
        with pytest.raises(TrainingStopped, match="2 steps in a row were skipped"):
            self.judge(resumed, float("inf"))

    def test_a_scaler_has_the_first_word(self, tmp_path):
        assert self.judge(self.guard(tmp_path), float("inf"), scaled=True) is False
        with pytest.raises(TrainingStopped, match="gradient norm is inf"):
            self.judge(self.guard(tmp_path), float("inf"))

    @pytest.mark.parametrize(("norm", "scaled"), [(float("nan"), False), (float("inf"), True)])
    def test_the_tokens_of_a_step_that_is_left_out_count_for_nothing(self, tmp_path, norm, scaled):
        """Neither for the balancing bias, nor for the shares of a load-balancing loss over the global batch."""
        fields = {"router_load_balancing_loss_coef": 1.0, "router_load_balancing_loss_scope": "global_batch"}
        layer = randomize(SharedExpertMoE(moe_config(**fields)))
        layer(torch.randn(1, 6, 16)).sum().backward()
        assert layer.gate.tally.pending
        guard = self.guard(tmp_path, on_nonfinite="skip")
        guard.on_gradients_clipped(torch.tensor(norm), layer, torch.optim.SGD(layer.parameters(), lr=0.1), scaled)
        assert not layer.gate.tally.pending
        assert not layer.gate.step_shares._has_counted
        assert not layer.gate.step_shares._sums_E.any()

    def test_the_scale_of_a_loss_that_is_left_out_is_forgotten(self, tmp_path):
        remember_scale(torch.ones((), requires_grad=True)).backward(torch.tensor(float("inf")))
        self.judge(self.guard(tmp_path, on_nonfinite="skip"), float("inf"))
        assert present_scale(torch.ones(())) == 1

    def test_spikes_can_stop(self, tmp_path):
        guard = self.guard(tmp_path, spike_factor=2.0, window=1, on_spike="stop")
        self.judge(guard, 1.0)
        with pytest.raises(TrainingStopped, match="--anomaly.on_spike skip"):
            self.judge(guard, 2.5)


def test_average_of_a_checkpoint_without_one(recipe, finished, tmp_path, capsys):
    finished(tmp_path / "out", step=8)
    assert train("--config", recipe(), "--resume", "auto", "--ema.decay", "0.9") == 0
    assert "has no averaged weights: the average starts from its weights" in capsys.readouterr().out
    assert (tmp_path / "out" / "final" / "ema" / "lit_model.pth").is_file()
