"""DeepSpeed's ZeRO: the same training as ddp, the same checkpoints, and errors that say what does not go together."""

import importlib.metadata
import importlib.util
import json
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import load_model
from litgpt_moe_ext.export.formats import export
from litgpt_moe_ext.training.parallel.deepspeed.settings import (
    engine_options,
    step_options,
)
from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.phases.checks import check_combination, check_strategy, strategy_note
from litgpt_moe_ext.training.settings import AnomalyArgs, DistributedArgs, EmaArgs, Settings
from tests.runs import ROOT, logged, recipe_writer, run_command, train, weights_of

PARTS = ("weights", "gradients", "optimizer")
STAGES = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


class TestSettings:
    """What can be said without DeepSpeed and without a GPU."""

    def test_stages(self):
        rows = [facts_of(name) for name in STAGES]
        assert [row.zero_stage for row in rows] == [1, 2, 3]
        assert [row.shards for row in rows] == [PARTS[2:], PARTS[1:], PARTS]
        assert facts_of("fsdp2").zero_stage is None

    def test_knobs(self):
        assert engine_options(facts_of("deepspeed_stage_2"), DistributedArgs()) == {"stage": 2, "pin_memory": False}
        knobs = {
            "overlap_comm": False,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 2000,
            "offload_optimizer": True,
        }
        assert engine_options(facts_of("deepspeed_stage_1"), DistributedArgs(**knobs)) == {
            "stage": 1,
            "pin_memory": True,
            **knobs,
        }

    def test_every_knob_is_one_of_fabrics(self):
        """A name that Fabric does not know would fail on a machine with GPUs only."""
        import inspect

        from lightning.fabric.strategies import DeepSpeedStrategy

        parameters = set(inspect.signature(DeepSpeedStrategy.__init__).parameters)
        for name in STAGES:
            args = DistributedArgs(**{knob: 2 if knob.endswith("size") else True for knob in facts_of(name).options})
            assert (
                {*engine_options(facts_of(name), args)}
                == {"stage", "pin_memory", *facts_of(name).options}
                <= parameters
            )

    def test_a_step(self):
        """DeepSpeed accumulates and clips as LitGPT's loop means it."""
        options = step_options(micro_batch_size=4, accumulation=8, max_norm=1, precision="32-true")
        assert options == {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 8,
            "gradient_clipping": 1.0,
            "zero_force_ds_cpu_optimizer": False,
        }
        mixed = step_options(micro_batch_size=4, accumulation=8, max_norm=1, precision="bf16-mixed")
        assert mixed == {**options, "data_types": {"grad_accum_dtype": "fp32"}}
        unclipped = step_options(micro_batch_size=4, accumulation=8, max_norm=None, precision="32-true")
        assert unclipped == {**options, "gradient_clipping": 0.0}

    def test_alone(self):
        """One process is allowed: what it optimizes can still be kept on the CPU."""
        assert strategy_note("deepspeed_stage_2", 1, DistributedArgs(offload_optimizer=True), "cuda") is None

    @pytest.mark.parametrize(
        ("strategy", "knobs", "accelerator", "message"),
        [
            ("deepspeed_stage_2", {}, "cpu", "strategy: 'deepspeed_stage_2' needs CUDA devices, and there is none"),
            ("deepspeed_stage_2", {"bucket_mb": 3}, "cuda", "distributed.bucket_mb: 3.0 would be ignored"),
            ("deepspeed_stage_2", {"offload_parameters": True}, "cuda", "distributed.offload_parameters: True would"),
            ("deepspeed_stage_3", {"allgather_bucket_size": 2}, "cuda", "distributed.allgather_bucket_size: 2 would"),
            ("ddp", {"overlap_comm": True}, "cpu", "leave it out, or use what it has: distributed.bucket_mb"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, strategy, knobs, accelerator, message):
        with pytest.raises(ValueError, match=message):
            check_strategy(strategy, DistributedArgs(**knobs), accelerator)

    @pytest.mark.parametrize(
        ("knobs", "message"),
        [
            ({"reduce_bucket_size": 0}, "distributed.reduce_bucket_size: 0 must be an integer of at least 1"),
            ({"allgather_bucket_size": 3}, "distributed.allgather_bucket_size: 3 must be even"),
        ],
        ids=str,
    )
    def test_sizes(self, knobs, message):
        with pytest.raises(ValueError, match=message):
            DistributedArgs(**knobs)

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(importlib.metadata, "version", none_installed)
        with pytest.raises(SettingsError, match="'deepspeed_stage_1' needs deepspeed.*, which is not.*--extra deep"):
            check_strategy("deepspeed_stage_1", DistributedArgs(), "cuda")

    @pytest.mark.parametrize("strategy", STAGES)
    def test_a_version_that_takes_steps_which_are_not_finite(self, monkeypatch, strategy):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.7")
        with pytest.raises(SettingsError, match=r"needs deepspeed>=0.19.8, and 0.19.7 is installed; `uv sync --extra"):
            check_strategy(strategy, DistributedArgs(), "cuda")
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0+unknown")
        check_strategy(strategy, DistributedArgs(), "cuda")

    def test_the_extra_is_what_is_needed(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert [facts_of(name).requires for name in STAGES] == 3 * project["optional-dependencies"]["deepspeed"]

    def check(self, strategy: str = "deepspeed_stage_3", **changes):
        check_combination(Settings(strategy=strategy, **changes))

    @pytest.mark.parametrize("setting", ["fused_cross_entropy", "cuda_graphs"])
    def test_used_weights_are_not_unused(self, setting):
        """These work outside the forward pass that ddp sees, which would wait for gradients twice, or for none."""
        unused = DistributedArgs(find_unused_parameters=True)
        with pytest.raises(SettingsError, match=f"find_unused_parameters: true cannot be combined with {setting}"):
            self.check("ddp", distributed=unused, **{setting: True})
        self.check("ddp", distributed=unused)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"precision": "bf16-true"},
                "precision: 'bf16-true' cannot be combined with strategy: 'deepspeed_stage_3'",
            ),
            ({"optimizer": "Adafactor"}, "optimizer: 'Adafactor' cannot be combined"),
            (
                {"optimizer": {"class_path": "litgpt_moe_ext.training.optim.muon.MuonAdamW"}},
                "optimizer: '.*MuonAdamW' cannot",
            ),
            ({"activation_checkpointing": "selective"}, "activation_checkpointing: 'selective' cannot be combined"),
            ({"compile": True}, "compile: true cannot be combined"),
            ({"anomaly": AnomalyArgs(spike_factor=5.0)}, "anomaly.spike_factor: 5.0 cannot be combined"),
            ({"ema": EmaArgs(decay=0.9)}, "ema.decay: 0.9 cannot be combined"),
        ],
        ids=str,
    )
    def test_what_cannot_be_combined(self, changes, message):
        with pytest.raises(ValueError, match=message):
            self.check(**changes)
        self.check("ddp", **changes)

    @pytest.mark.parametrize("optimizer", ["SGD", {"class_path": "torch.optim.adamw.AdamW"}])
    def test_what_can(self, optimizer):
        self.check(optimizer=optimizer)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
    def test_a_run_without_gpus_ends_at_once(self, recipe, tmp_path, capsys):
        assert train("--config", recipe(), "--strategy", "deepspeed_stage_3") == 2
        assert "error: strategy: 'deepspeed_stage_3' needs CUDA devices" in capsys.readouterr().err
        assert not (tmp_path / "out" / "train.log").exists()


def none_installed(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


TELLING = {
    # Several groups, one with a rate of its own; an auxiliary loss, whose gradient depends on the scale of the loss.
    "parameter_groups": {"no_weight_decay": ["norms", "embeddings"], "router_lr_factor": 0.5},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "weight_decay": 0.1}},
    "model_config": {"router_load_balancing_loss_coef": 0.01},
    "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_tokens": 4 * 8 * 32, "save_interval": 2},
    "eval": {"interval": 2, "max_iters": 2},
    "devices": "auto",
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs `uv sync --extra deepspeed`")
class TestTraining:
    """DeepSpeed's own code, over gloo."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory, corpus_settings) -> tuple[Path, str]:
        """Four steps of two micro batches on each of two processes under every strategy, and mixtures of them."""
        folder = tmp_path_factory.mktemp("zero")
        write = recipe_writer(folder, corpus_settings)
        plans = []

        def plan(name: str, strategy: str, *options: str, processes: int = 2, status: int = 0, **changes) -> None:
            file = write(name, **TELLING, out_dir=str(folder / name), strategy=strategy, **changes)
            plans.append([processes, status, ["--config", str(file), *options]])

        for strategy in ("ddp", *STAGES):
            plan(strategy, strategy)
        offload = {"offload_optimizer": True, "offload_parameters": True}
        # As many sequences to validate on as two processes have.
        alone = ("--eval.max_iters", "4", "--resume")
        plan("ddp, then stage 2", STAGES[1], "--resume", f"{folder}/ddp/step-00000002")
        saved = f"{folder}/{STAGES[0]}/step-00000002"
        plan("stage 1, then 3 alone", STAGES[2], *alone, saved, processes=1, distributed=offload)
        plan("stage 3, then alone", "auto", *alone, f"{folder}/{STAGES[2]}/step-00000002", processes=1)
        for strategy in ("ddp", STAGES[0], STAGES[2]):
            plan(f"bf16 {strategy}", strategy, "--precision", "bf16-mixed")
        too_far = [
            "--optimizer.init_args.lr",
            "1.0e+30",
            "--anomaly.on_nonfinite",
            "skip",
            "--anomaly.max_consecutive",
            "2",
        ]
        plan("too far", STAGES[1], *too_far, processes=1, status=1)
        bad = {"callbacks": [{"class_path": "tests.training.parallel.deepspeed_on_cpus.NotFinite"}]}
        skip = ("--anomaly.on_nonfinite", "skip", "--train.save_interval", "1", "--precision")
        for strategy in STAGES:
            for precision in ("32-true", "bf16-mixed"):
                plan(f"one bad step, {precision} {strategy}", strategy, *skip, precision, **bad)
        module = "tests.training.parallel.deepspeed_on_cpus"
        ended = run_command(sys.executable, "-m", module, json.dumps(plans))
        return folder, ended.stdout + ended.stderr

    @pytest.mark.parametrize("strategy", STAGES)
    def test_the_training_is_that_of_ddp(self, runs, strategy):
        self.assert_same_training(runs[0] / strategy, runs[0] / "ddp")

    @pytest.mark.parametrize("name", ["ddp, then stage 2", "stage 1, then 3 alone", "stage 3, then alone"])
    def test_another_strategy_and_number_of_processes_go_on(self, runs, name):
        """Weights, moments and rates come out of the checkpoint whole, and go into it."""
        self.assert_same_training(runs[0] / name, runs[0] / "ddp")

    @pytest.mark.parametrize("strategy", [STAGES[0], STAGES[2]])
    def test_bf16(self, runs, strategy):
        """Near ddp's, whose weights are float32 in the forward pass too; checkpoints are in float32."""
        folder, _ = runs
        ours, theirs = (self.numbers(folder / f"bf16 {name}", "loss") for name in (strategy, "ddp"))
        assert ours == pytest.approx(theirs, abs=0.03)
        assert ours != theirs
        weights = weights_of(folder / f"bf16 {strategy}" / "final")
        rounded = {n: w for n, w in weights.items() if torch.equal(w, w.bfloat16().float())}
        assert {w.dtype for w in weights.values()} == {torch.float32}
        assert not any(name.endswith("proj") for name in rounded)
        biases = (w for name, w in weights.items() if name.endswith("e_score_correction_bias"))
        assert all(bias.abs().max() > 0.005 for bias in biases)

    def test_steps_that_are_not_finite_are_left_out(self, runs):
        folder, output = runs
        assert "step 2 is skipped: the gradient norm is inf; its batch is in" in output
        assert "2 steps in a row were skipped (anomaly.max_consecutive)" in output
        assert (folder / "too far" / "anomalies" / "step-00000002-rank-0.pt").is_file()

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    @pytest.mark.parametrize("strategy", STAGES)
    def test_a_step_that_is_not_finite_changes_nothing(self, runs, strategy, precision):
        """On one process, in the middle of a training that goes on."""
        run = runs[0] / f"one bad step, {precision} {strategy}"
        assert "step 2 is skipped: the gradient norm is inf" in (run / "train.log").read_text()
        before, after = (weights_of(run / f"step-0000000{step}") for step in (1, 2))
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert all(weight.isfinite().all() for weight in weights_of(run / "final").values())

    def test_litgpt_opens_the_checkpoint(self, runs):
        final = runs[0] / STAGES[2] / "final"
        model = GPT(Config.from_file(final / "model_config.yaml"))
        model.load_state_dict(weights_of(final), strict=True)

    def test_it_is_exported_like_any_other(self, runs, tmp_path):
        final = runs[0] / STAGES[2] / "final"
        export(final, tmp_path / "hf", "hf")
        saved = weights_of(final)["lm_head.weight"]
        assert torch.equal(load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"], saved)
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
        ours, tokens = load_model(final, torch.device("cpu"), torch.float32), torch.arange(32)[None]
        with torch.no_grad():
            torch.testing.assert_close(opened(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-5)

    def numbers(self, run: Path, column: str) -> dict[int, float]:
        return {step: float(value) for step, value in logged(run, column).items()}

    def assert_same_training(self, run: Path, reference: Path) -> None:
        for column in ("loss", "val_loss", "grad_norm", "learning_rate", "moe/max_vio"):
            ours, theirs = self.numbers(run, column), self.numbers(reference, column)
            assert ours
            assert ours == pytest.approx({step: theirs[step] for step in ours}, rel=1e-4), column
        ours, theirs = (torch.load(d / "final" / "lit_model.pth", weights_only=True) for d in (run, reference))
        assert list(ours["model"]) == list(theirs["model"])
        for name, weight in ours["model"].items():
            torch.testing.assert_close(weight, theirs["model"][name], atol=1e-4, rtol=1e-3, msg=name)
            if name.endswith("e_score_correction_bias"):
                assert torch.equal(weight, theirs["model"][name])
        ours, theirs = ours["optimizer"], theirs["optimizer"]
        assert [group["params"] for group in ours["param_groups"]] == [g["params"] for g in theirs["param_groups"]]
        for index, state in ours["state"].items():
            for key, value in state.items():
                torch.testing.assert_close(value, theirs["state"][index][key], atol=1e-5, rtol=1e-2)
