"""The examples run, through the same entry point as a training of one's own."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
import yaml

from litgpt_moe_ext import extend
from litgpt_moe_ext.moe.activations import Pointwise
from litgpt_moe_ext.moe.registry import ActivationType
from tests.docs.pages import recipe_of
from tests.runs import ROOT, run_command

SCRIPT = ROOT / "examples" / "add_a_router.py"

LOAD = """
import sys, torch
from litgpt import GPT, Config
model = GPT(Config.from_file(sys.argv[1] + "/model_config.yaml"))
model.load_state_dict(torch.load(sys.argv[1] + "/lit_model.pth")["model"])
assert model.transformer.h[0].mlp.gate.log_temperature.item() != 0
"""

RECIPE = {
    "model_config": {
        "name": "tiny",
        "block_size": 32,
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "vocab_size": 300,
        "padded_vocab_size": 304,
        "norm_class_name": "RMSNorm",
        "bias": False,
        "mlp_class_name": "MoE",
        "router_score_function": "sigmoid",
        "router_bias_update_rate": 0.01,
        "norm_topk_prob": True,
        "n_expert": 4,
        "n_expert_per_token": 2,
        "moe_intermediate_size": 8,
    },
    "train": {"global_batch_size": 4, "micro_batch_size": 4, "max_tokens": 4 * 4 * 32, "log_interval": 1},
    "eval": {"interval": 4, "max_iters": 1},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}},
    "devices": 1,
    "seed": 3,
}


@pytest.mark.slow
def test_a_router_of_ones_own_trains(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in (ROOT / "tests").glob("*.py"):
        (source / path.name).write_text(path.read_text(encoding="utf-8") * 3, encoding="utf-8")
    data = {"data_path": str(tmp_path / "data"), "source_path": str(source), "vocab_size": 300, "val_fraction": 0.2}
    recipe = tmp_path / "recipe.yaml"
    data = {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": data}
    recipe.write_text(yaml.safe_dump({**RECIPE, "out_dir": str(tmp_path / "out"), "data": data}))
    mine = tmp_path / "mine.yaml"
    mine.write_text(recipe_of("add_a_router"))
    changes = ["--config", mine, "--model_config.router_initial_temperature", "2.0"]
    run_command(sys.executable, SCRIPT, "--config", recipe, *changes, cwd=tmp_path)
    saved = yaml.safe_load((tmp_path / "out" / "final" / "model_config.yaml").read_text())
    assert saved["router_spread_loss_coef"] == 0.01
    log = (tmp_path / "out" / "metrics-wide.csv").read_text().splitlines()
    columns = dict(zip(log[0].split(","), log[1].split(","), strict=True))
    assert float(columns["moe/spread_loss"]) >= 0.01 * 0.999

    # Installed, as an entry point names it, the router is known wherever LitGPT is.
    installed = tmp_path / "my_package-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1\n")
    (installed / "entry_points.txt").write_text("[litgpt_moe_ext.extensions]\nmy_package = add_a_router:register\n")
    path = os.pathsep.join([str(tmp_path), str(SCRIPT.parent)])
    run_command(sys.executable, "-c", LOAD, tmp_path / "out" / "final", PYTHONPATH=path)

    # The twin without experts has neither its router nor its loss.
    both = tmp_path / "both.yaml"
    temperature = {"router_type": "temperature", "router_initial_temperature": 2.0, "router_score_function": None}
    ignored = {"norm_topk_prob": False, "router_bias_update_rate": None}
    both.write_text(yaml.safe_dump({"model_config": RECIPE["model_config"] | temperature | ignored}))
    command = [Path(sys.executable).with_name("litgpt-moe"), "twin", both, tmp_path / "twin.yaml"]
    run_command(*command, PYTHONPATH=path)
    assert not [
        name for name in yaml.safe_load((tmp_path / "twin.yaml").read_text())["model_config"] if "router" in name
    ]

    # Where it is not, LitGPT's own commands say what is missing.
    litgpt = [Path(sys.executable).with_name("litgpt"), "generate", tmp_path / "out" / "final", "--max_new_tokens", "2"]
    run_command(*litgpt, PYTHONPATH=path)
    ended = subprocess.run(litgpt, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    file = tmp_path / "out" / "final" / "model_config.yaml"
    message = f"error: {file} has the field router_initial_temperature, which this version does not know; if an extens"
    assert ended.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in ended.stderr


def test_the_same_may_be_registered_twice(monkeypatch):
    """As by a script and by the entry point of the package that it is part of."""
    monkeypatch.setattr(extend, "ACTIVATIONS", {})
    for _ in range(2):
        extend.register_activation("mine", ActivationType(Pointwise(F.mish), gated=True))
    with pytest.raises(ValueError, match="'mine' is registered already"):
        extend.register_activation("mine", ActivationType(Pointwise(F.gelu), gated=True))


@pytest.mark.parametrize(
    ("fail", "reason"), [(lambda: {}["nothing"], "KeyError: 'nothing'"), (lambda: sys.exit("bye"), "SystemExit: bye")]
)
def test_an_extension_that_fails_is_left_out_with_a_warning(monkeypatch, fail, reason):
    called = []
    broken, whole = (
        SimpleNamespace(name=name, value=f"{name}:register", load=lambda call=call: call)
        for name, call in (("broken", fail), ("whole", lambda: called.append(1)))
    )
    monkeypatch.setattr(extend, "entry_points", lambda group: [broken, whole])
    monkeypatch.setattr(extend, "_called", set())
    with pytest.warns(RuntimeWarning, match=rf"the extension broken \(broken:register\) is skipped: {reason}"):
        extend.load_extensions()
    assert called
