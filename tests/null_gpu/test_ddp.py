"""Passes as CUDA graphs in several processes, whose gradients DDP exchanges over NCCL: whole runs on null GPUs."""

import pytest
import torch

from tests.null_gpu.ranks import outputs
from tests.runs import logged, weights_of

pytestmark = pytest.mark.slow


def test_graphs_under_ddp(gpu, recipe, tmp_path):
    """The run of two processes is the one without graphs, bit for bit."""
    train = {"max_tokens": 5 * 8 * 32, "global_batch_size": 8}
    documents = {"attention_document_boundary": "eos", "attention_document_token_id": 0}
    model = {"n_layer": 1, "expert_dropout": 0.1, **documents}
    file = recipe(devices="auto", precision="bf16-mixed", train=train, model_config=model)
    graphs, plain = tmp_path / "graphs", tmp_path / "plain"
    said = {}
    for out_dir, flag in ((graphs, "true"), (plain, "false")):
        command = (
            "-m",
            "tests.null_gpu.computed_training",
            "--config",
            file,
            "--out_dir",
            out_dir,
            "--cuda_graphs",
            flag,
        )
        said[flag], _ = outputs(gpu, 2, *command)
    assert "CUDA graphs: on, from this step" in said["true"]
    assert "CUDA graphs: on" not in said["false"]
    for column in ("loss", "val_loss", "grad_norm", "moe/max_vio"):
        assert logged(graphs, column) == logged(plain, column) != {}
    ours, theirs = weights_of(graphs / "final"), weights_of(plain / "final")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
