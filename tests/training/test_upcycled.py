"""A dense run, upcycled, goes on as an MoE run from the loss that it had."""

import pytest

from litgpt_moe_ext.cli.main import main as console
from tests.runs import logged, train

DENSE = {
    "mlp_class_name": "LLaMAMLP",
    "intermediate_size": 24,
    **dict.fromkeys(
        (
            *("n_expert", "n_expert_per_token", "n_shared_expert", "moe_intermediate_size", "norm_topk_prob"),
            "router_bias_update_rate",
        )
    ),
}


def test_a_dense_run_goes_on_as_moe(recipe, tmp_path, capsys):
    dense = recipe("dense", out_dir=str(tmp_path / "dense"), model_config=DENSE)
    assert train("--config", dense) == 0
    moe = recipe("moe", model_config={"moe_intermediate_size": 16, "shared_expert_intermediate_size": 8})
    final = tmp_path / "dense" / "final"
    # Without learning, and whatever the balancing bias does, the function stays.
    still = ("--optimizer.lr", "0.0", "--train.min_lr", "0.0", "--train.max_steps", "4")
    start = ("--config", moe, *still, "--initial_checkpoint_dir")
    assert train(*start, final) == 2
    assert f"`litgpt-moe upcycle {final} RECIPE NEW_DIRECTORY`" in capsys.readouterr().err

    assert console(["upcycle", str(final), str(moe), str(tmp_path / "upcycled")]) == 0
    assert train(*start, tmp_path / "upcycled") == 0
    before, after = (logged(tmp_path / name, "val_loss") for name in ("dense", "out"))
    assert float(after[4]) == pytest.approx(float(before[12]), abs=1e-4)
