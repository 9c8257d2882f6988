"""Two ranks on null GPUs over NCCL: the training of one process under every strategy, and no more waits."""

from pathlib import Path

import pytest
import torch

from tests.null_gpu.ranks import outputs
from tests.runs import logged, weights_of

pytestmark = pytest.mark.slow

SETTINGS = {
    # Experts by operators, because Triton's interpreter takes its time.
    "model_config": {
        "n_layer": 1,
        "expert_backend": "loop",
        "router_load_balancing_loss_coef": 0.01,
        "router_load_balancing_loss_scope": "global_batch",
    },
    "optimizer": {"class_path": "litgpt_moe_ext.training.optim.muon.MuonAdamW", "init_args": {"lr": 1e-3}},
    "activation_checkpointing": "full",
    "ema": {"decay": 0.5},
    "sample": {"prompts": ["def "], "max_new_tokens": 2},
    "eval": {"interval": 5, "max_iters": 2},
    "devices": "auto",
    "cuda_graphs": False,
}


def waits(output: str) -> list[int]:
    """Return how often the host waited in the steps of a rank."""
    (line,) = (line for line in output.splitlines() if line.startswith("waits: "))
    return [int(number) for number in line.split()[1:]]


def numbers(out_dir: Path, column: str) -> dict[int, float]:
    """Return a column of a run's metrics by step."""
    return {step: float(value) for step, value in logged(out_dir, column).items()}


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("ddp", "bf16-mixed"), ("fsdp", "16-mixed"), ("fsdp2", "32-true")],
)
def test_two_ranks_train_as_one(gpu, recipe, tmp_path, strategy, precision):
    """A checkpoint of the two is gone on with by one; the host waits as often as that of one process."""

    def train(name: str, ranks: int, *flags: str) -> list[str]:
        # DDP looks at its own times in the first ten steps.
        batches = {"max_tokens": 15 * 128, "micro_batch_size": 4 // ranks, "log_interval": 4, "save_interval": 5}
        changes = {"train": batches, "strategy": strategy, "precision": precision, "out_dir": str(tmp_path / name)}
        file = recipe(name, **SETTINGS, **changes)
        return outputs(gpu, ranks, "-m", "tests.null_gpu.computed_training", "--config", file, *flags)

    (one,), two = train("one", 1), train("two", 2)
    # In 16 bits tokens between two experts may go to the other one.
    of_losses = 5e-4 if precision == "32-true" else 2e-3
    for column, tolerance in (("loss", of_losses), ("val_loss", of_losses), ("grad_norm", 2e-2)):
        ours, theirs = (numbers(tmp_path / name, column) for name in ("two", "one"))
        assert ours == pytest.approx(theirs, rel=tolerance), column
    expected = weights_of(tmp_path / "one" / "final")
    for name, weight in weights_of(tmp_path / "two" / "final").items():
        # By such a token a bias turns around.
        if precision != "32-true" and name.endswith("e_score_correction_bias"):
            continue
        torch.testing.assert_close(weight, expected[name], atol=5e-3, rtol=1e-2)
    assert "failed" not in two[0]
    for output in two:
        assert waits(output)[-2:] == waits(one)[-2:]
    train("gone on", 1, "--resume", str(tmp_path / "two" / "step-00000010"))
    theirs = numbers(tmp_path / "one", "loss")
    assert numbers(tmp_path / "gone on", "loss") == pytest.approx({12: theirs[12]}, rel=of_losses)


def test_a_model_that_no_device_holds_whole(gpu, recipe, tmp_path):
    """It is made in the memory of the CPU, from where each rank takes its shard of a block at a time."""
    # 92 MiB of weights.
    model = {"n_layer": 12, "n_embd": 256, "moe_intermediate_size": 256, "expert_backend": "loop"}
    file = recipe(
        model_config=model,
        train={"global_batch_size": 2, "micro_batch_size": 1, "max_tokens": 64, "lr_warmup_steps": 0},
        eval={"interval": 9, "final_validation": False},
        strategy="fsdp2",
        precision="32-true",
        devices="auto",
        cuda_graphs=False,
        distributed={"cpu_offload": True},
    )
    command = ("-m", "tests.null_gpu.computed_training", "--config", file)
    output, _ = outputs(gpu, 2, *command, NULL_GPU_MIB="92")
    assert "it is made in the memory of the CPU" in output
    assert len(logged(tmp_path / "out", "loss")) == 1
