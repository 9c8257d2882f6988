"""Whole trainings on null GPUs in which no stream reads what another may still be writing."""

import pytest

from tests.null_gpu.ranks import outputs, start
from tests.runs import PATIENCE

pytestmark = pytest.mark.slow

# PyTorch lets no stream wait for what it knows to be over, so the GPU lags behind.
SANITIZER = {"TORCH_CUDA_SANITIZER": "1", "NULL_GPU_LAG": "1000"}
SETTINGS = {
    "devices": "auto",
    "precision": "bf16-mixed",
    "train": {"max_tokens": 4 * 8 * 32, "global_batch_size": 8, "save_interval": 2},
    "eval": {"interval": 2, "max_iters": 2},
    "ema": {"decay": 0.5},
    "sample": {"prompts": ["def "], "max_new_tokens": 2},
}


@pytest.mark.parametrize(
    ("way", "ranks"), [("by_a_stream", 1), ("by_a_graph", 1), ("for_a_graph", 1), ("by_the_other_rank", 2)]
)
def test_races_are_seen(gpu, way, ranks):
    waiting = outputs(gpu, ranks, "-m", "tests.null_gpu.racing", way, "wait", **SANITIZER)
    assert [output.splitlines()[-1] for output in waiting] == ["6.0"] * ranks
    racing = start(gpu, ranks, "-m", "tests.null_gpu.racing", way, "race", **SANITIZER)
    for output in [process.communicate(timeout=PATIENCE)[0] for process in racing]:
        assert "CUDASanitizerErrors: detected 1 errors" in output


def test_weights_are_sent_when_they_are_drawn_and_read_when_they_are_there(gpu):
    """DDP sends those of the first rank on a stream of its own."""
    found = outputs(gpu, 2, "-m", "tests.null_gpu.replica", **SANITIZER)
    assert [output.splitlines()[-1] for output in found] == ["6.0", "6.0"]


@pytest.mark.parametrize(
    ("ranks", "strategy", "graphs", "model"),
    [(2, "ddp", True, {"expert_dropout": 0.1}), (2, "fsdp2", False, {"expert_backend": "loop"})],
    ids=["graphs and ddp", "fsdp2"],
)
def test_trainings_have_none(gpu, recipe, tmp_path, ranks, strategy, graphs, model):
    changes = {"strategy": strategy, "cuda_graphs": graphs, "model_config": {"n_layer": 1, **model}}
    file = recipe(**SETTINGS, **changes)
    said = outputs(gpu, ranks, "-m", "tests.null_gpu.computed_training", "--config", file, **SANITIZER)
    assert ("CUDA graphs: on, from this step" in said[0]) == graphs
    assert (tmp_path / "out" / "final").is_dir()
