"""Processes with other settings, other code or other data than the first one."""

import shutil

import pytest

from litgpt_moe_ext.training.parallel.sameness import differences
from tests.training.processes import Training, free_port

CODE = "litgpt_moe_ext 0.1.0, commit 0123456789ab, torch 2.11.0"
SETTINGS = {
    "train": {"max_tokens": 512},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}},
    "data": {"class_path": "TextCorpus", "init_args": {"data_path": "data/text"}},
    "log": {"run": "19:05:01"},
    "evaluate": {"hellaswag": "data/hellaswag_val.jsonl"},
    "devices": 2,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.2}}},
            "optimizer.lr: 0.2 on rank 3 mu",
        ),
        ({"train": {}}, "train.max_tokens: null on rank 3 must be 512, as on rank 0; start all nodes with the same"),
        ({"seed": 1}, "seed: 1 on rank 3 must be null, as on rank 0"),
        ({"initial_checkpoint_dir": "there"}, "initial_checkpoint_dir: a path on rank 3 must be null"),
        ({"data": {"class_path": "TextCorpus", "init_args": {"data_path": "/local/text"}}}, None),
        ({"log": {"run": "19:05:02"}, "evaluate": {"hellaswag": "/local/hellaswag_val.jsonl"}}, None),
        ({"devices": "auto", "num_nodes": 2, "resume": True, "progress": False}, None),
    ],
    ids=str,
)
def test_settings(changes, message):
    found = list(differences((SETTINGS | changes, CODE), (SETTINGS, CODE), 3))
    assert len(found) == (message is not None)
    assert all(text.startswith(message) for text in found)


@pytest.mark.parametrize(
    ("code", "differs"),
    [
        (CODE, False),
        ("litgpt_moe_ext 0.1.0, torch 2.11.0", False),  # a node without git
        (CODE.replace("ab,", "ab+changes,"), True),
        (CODE.replace("0123", "4567"), True),
        ("litgpt_moe_ext 0.1.0, torch 2.10.0", True),
        ("litgpt_moe_ext 0.2.0, torch 2.11.0", True),
    ],
)
def test_code(code, differs):
    found = list(differences((SETTINGS, code), (SETTINGS, CODE), 1))
    assert found == (
        [f"software: {code} on rank 1 must be {CODE}, as on rank 0; install the same on all nodes"] * differs
    )


def outputs_of_two(recipe, *flags):
    """Return the outputs of two nodes, each with a flag of its own, once both were refused."""
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        Training("--config", recipe(), "--num_nodes=2", "--devices=auto", flag,
                 environment={**place, "RANK": str(rank)})
        for rank, flag in enumerate(flags)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], outputs
    assert not any("Traceback" in output for output in outputs)
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.max_tokens", "optimizer.lr"])
def test_a_node_with_another_recipe(recipe, name):
    """Both end with the same line: neither trains with other weights, nor waits for the other."""
    for output in outputs_of_two(recipe, f"--{name}=1024", f"--{name}=512"):
        assert f"error: {name}: 512" in output
        assert " on rank 1 must be 1024" in output


@pytest.mark.slow
def test_a_node_with_other_data(recipe, corpus_settings, tmp_path):
    """Both have text of their own under the same path, as on disks of the nodes."""
    shutil.copytree(corpus_settings["source_path"], tmp_path / "source")
    (tmp_path / "source" / "csv.py").unlink()
    sources = (corpus_settings["source_path"], tmp_path / "source")
    for output in outputs_of_two(recipe, *(f"--data.source_path={source}" for source in sources)):
        assert "error: data: rank 1 has the corpus " in output
