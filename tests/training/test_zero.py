"""DeepSpeed's ZeRO: the same training as ddp, the same checkpoints, and errors that say what does not go together."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT, Config

from litgpt_moe_ext.training.arguments import AnomalyArgs, DistributedArgs, EmaArgs
from litgpt_moe_ext.training.cli import main
from litgpt_moe_ext.training.strategies import check_strategy, single_process_note
from litgpt_moe_ext.training.zero.settings import check_combination, engine_options, stage_of, step_options
from tests.training.conftest import ROOT, logged

STAGES = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


class TestSettings:
    """What can be said without DeepSpeed and without a GPU."""

    def test_stages(self):
        assert [stage_of(name) for name in STAGES] == [1, 2, 3]
        assert stage_of("fsdp2") is None

    def test_knobs(self):
        assert engine_options(2, DistributedArgs()) == {"stage": 2, "pin_memory": False}
        knobs = {
            "overlap_comm": False,
            "reduce_bucket_size": 1000,
            "allgather_bucket_size": 2000,
            "offload_optimizer": True,
        }
        assert engine_options(1, DistributedArgs(**knobs)) == {"stage": 1, "pin_memory": True, **knobs}

    def test_every_knob_is_one_of_fabrics(self):
        """A name that Fabric does not know would fail on a machine with GPUs only."""
        import inspect

        from lightning.fabric.strategies import DeepSpeedStrategy

        names = (
            "overlap_comm",
            "reduce_bucket_size",
            "allgather_bucket_size",
            "offload_optimizer",
            "offload_parameters",
        )
        args = DistributedArgs(**{name: 2 for name in names})
        assert set(engine_options(3, args)) <= set(inspect.signature(DeepSpeedStrategy.__init__).parameters)

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

    def test_alone(self):
        """One process is allowed: what it optimizes can still be kept on the CPU."""
        assert single_process_note("deepspeed_stage_2", 1, DistributedArgs(offload_optimizer=True)) is None

    @pytest.mark.parametrize(
        ("strategy", "knobs", "accelerator", "message"),
        [
            ("deepspeed_stage_2", {}, "cpu", "strategy: 'deepspeed_stage_2' needs CUDA devices, and there is none"),
            ("deepspeed_stage_2", {"bucket_mb": 3}, "cuda", "distributed.bucket_mb: 3 would be ignored"),
            ("deepspeed_stage_2", {"offload_parameters": True}, "cuda", "distributed.offload_parameters: True would"),
            ("deepspeed_stage_3", {"allgather_bucket_size": 2}, "cuda", "distributed.allgather_bucket_size: 2 would"),
            ("ddp", {"overlap_comm": True}, "cpu", "it has distributed.bucket_mb"),
        ],
        ids=str,
    )
    def test_what_does_not_fit(self, strategy, knobs, accelerator, message):
        with pytest.raises(ValueError, match=message):
            check_strategy(strategy, DistributedArgs(**knobs), accelerator)

    @pytest.mark.parametrize(
        ("knobs", "message"),
        [
            ({"reduce_bucket_size": 0}, "distributed.reduce_bucket_size: 0 must be at least 1"),
            ({"allgather_bucket_size": 3}, "distributed.allgather_bucket_size: 3 must be even"),
        ],
        ids=str,
    )
    def test_sizes(self, knobs, message):
        with pytest.raises(ValueError, match=message):
            DistributedArgs(**knobs)

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="'deepspeed_stage_1' needs the package deepspeed.*`uv sync --extra deep"):
            check_strategy("deepspeed_stage_1", DistributedArgs(), "cuda")

    def check(self, strategy: str = "deepspeed_stage_3", **changes):
        usual = {
            "precision": None,
            "optimizer": "AdamW",
            "compile": "auto",
            "activation_checkpointing": "none",
            "anomaly": AnomalyArgs(),
            "ema": EmaArgs(),
        }
        check_combination(strategy, **{**usual, **changes})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"precision": "bf16-true"},
                "precision: 'bf16-true' cannot be combined with strategy: 'deepspeed_stage_3'",
            ),
            ({"optimizer": "Adafactor"}, "optimizer: 'Adafactor' cannot be combined"),
            (
                {"optimizer": {"class_path": "litgpt_moe_ext.training.muon.MuonAdamW"}},
                "optimizer: '.*MuonAdamW' cannot",
            ),
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

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_run_without_gpus_ends_at_once(self, recipe, tmp_path, capsys):
        assert main(["--config", str(recipe()), "--strategy", "deepspeed_stage_3"]) == 2
        assert "error: strategy: 'deepspeed_stage_3' needs CUDA devices" in capsys.readouterr().err
        assert not (tmp_path / "out" / "logs").exists()


def train(*runs: tuple[int, Path, list[str]]) -> str:
    """Do runs, of so many processes each, one after the other, and return what they said."""
    todo = [[processes, ["--config", str(config), *more]] for processes, config, more in runs]
    process = subprocess.run(
        [sys.executable, "-m", "tests.training.deepspeed_on_cpus", json.dumps(todo)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def numbers(run: Path, column: str) -> dict[int, float]:
    return {step: float(value) for step, value in logged(run, column).items()}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="uv sync --extra deepspeed")
class TestTraining:
    """Two processes over gloo, with DeepSpeed's own code."""

    @pytest.fixture(scope="class")
    def runs(self, tmp_path_factory, corpus_settings) -> Path:
        """Six steps of two micro batches on two processes under every strategy; goings-on from step 3 under others."""
        folder = tmp_path_factory.mktemp("zero")
        (folder / "files").mkdir()
        write = write_recipe(folder / "files", corpus_settings)

        def config(name: str, strategy: str, **changes) -> Path:
            changes["train"] = {**TRAIN, **changes.get("train", {})}
            return write(name, out_dir=str(folder / name), strategy=strategy, devices="auto", **{**TELLING, **changes})

        train(
            *((2, config(name, name), []) for name in ("ddp", *STAGES)),
            (2, config("ddp-2", STAGES[1]), ["--resume", str(folder / "ddp" / "step-00000003")]),
            (
                1,
                config("3-ddp", "auto", train={"micro_batch_size": 4}),
                ["--resume", str(folder / STAGES[2] / "step-00000003")],
            ),
        )
        return folder
