"""Two ranks that are told to end, and four, some on two machines, that go on: the training of one process."""

import importlib.util
import signal

import pytest

from tests.null_gpu.ranks import finished, outputs, start
from tests.runs import logged
from tests.training.signalling import wait_for_signal

pytestmark = pytest.mark.slow

MUON = {"class_path": "litgpt_moe_ext.training.optim.muon.MuonAdamW", "init_args": {"lr": 1e-3}}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
OFFLOADED = {"cpu_offload": True}
SETTINGS = {
    # By two and by four this leaves a rank with fewer experts than the others, and one with none.
    "model_config": {"n_layer": 1, "expert_backend": "loop", "n_expert": 5},
    "activation_checkpointing": "full",
    "precision": "32-true",
    "devices": "auto",
    "cuda_graphs": False,
}


@pytest.mark.parametrize(
    ("before", "after", "machines", "optimizer", "knobs"),
    [
        ("ddp", "fsdp2", 1, MUON, {}),
        ("fsdp2", "fsdp", 2, MUON, OFFLOADED),
        ("deepspeed_stage_3", "deepspeed_stage_2", 2, ADAMW, {"offload_optimizer": True}),
    ],
)
def test_others_go_on(gpu, recipe, tmp_path, before, after, machines, optimizer, knobs):
    """With everything that an optimizer knows, wherever it is kept."""
    # The environment of the tests is without it: `uv sync --extra deepspeed` installs it.
    if "deepspeed" in before and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is an extra")

    def command(out_dir: str, ranks: int, strategy: str, knobs: dict, *flags: str, **more) -> list[str]:
        batches = {"max_tokens": 12 * 128, "micro_batch_size": 4 // ranks, "save_interval": None}
        changes = {"train": batches, "strategy": strategy, "optimizer": optimizer, "distributed": knobs, **more}
        file = recipe(f"{strategy}-{ranks}", out_dir=str(tmp_path / out_dir), **SETTINGS, **changes)
        return ["-m", "tests.null_gpu.computed_training", "--config", str(file), *flags]

    outputs(gpu, 1, *command("one", 1, "auto", {}))
    two = start(gpu, 2, *command("several", 2, before, knobs, callbacks=wait_for_signal(3, rank=1)))
    next(line for line in two[0].stdout if line.startswith("step 3/"))
    two[1].send_signal(signal.SIGTERM)
    finished(two, 128 + signal.SIGTERM)
    (saved,) = (tmp_path / "several").glob("step-*")
    assert 3 <= int(saved.name.removeprefix("step-")) < 12
    outputs(gpu, 4, *command("several", 4, after, knobs, "--resume", "auto"), machines=machines)
    for column in ("loss", "grad_norm"):
        ours, theirs = (
            {step: float(value) for step, value in logged(tmp_path / name, column).items()}
            for name in ("several", "one")
        )
        assert ours == pytest.approx(theirs, rel=1e-4), column
