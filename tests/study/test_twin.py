"""Twins cost the same, and their recipes keep what still applies."""

import re
from pathlib import Path

import pytest
import yaml

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.config.fields import expert_fields
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.study.recipes import twin_settings
from litgpt_moe_ext.study.twin import Experts, cost, dense_twin, moe_twin
from tests.settings import read_settings

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
BASE = {
    "name": "small", "block_size": 32, "n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 64,
    "padded_vocab_size": 64, "bias": False, "parallel_residual": False,
}  # fmt: skip
MOE = BASE | {
    "mlp_class_name": "SharedExpertMoE", "n_expert": 8, "n_expert_per_token": 2, "n_shared_expert": 1,
    "moe_intermediate_size": 48, "norm_topk_prob": True, "router_bias_update_rate": 0.01,
}  # fmt: skip


@pytest.mark.parametrize("by", ["flops", "parameters"])
def test_dense_twin_has_the_cost_counted_by_hand(by):
    twin = dense_twin(MOE, 32, by)
    # Three matrices of 64 x 48 for each of 2 + 1 experts, and the router of 64 x 8; a dense layer has 64 x 3 per unit.
    by_hand = (3 * 3 * 64 * 48 + 64 * 8) / (3 * 64)
    assert abs(twin["intermediate_size"] - by_hand) <= 2
    assert twin["mlp_class_name"] == "FeedForward"
    assert not expert_fields() & set(twin)
    assert cost(twin, 32, by) == pytest.approx(cost(MOE, 32, by), rel=0.005)


@pytest.mark.parametrize("changed", [
    {"first_k_dense_replace": 1, "intermediate_size": 96},
    {"mlp_class_name": "NoisyTopKMoE", "n_shared_expert": 0, "router_bias_update_rate": None, "norm_topk_prob": False},
    {"mlp_class_name": "LLaMAMoE", "n_shared_expert": None, "router_bias_update_rate": None},
])  # fmt: skip
def test_dense_twin_of_other_layers(changed):
    model = {name: value for name, value in (MOE | changed).items() if value is not None}
    twin = dense_twin(model, 32)
    assert cost(twin, 32, "flops") == pytest.approx(cost(model, 32, "flops"), rel=0.005)


@pytest.mark.parametrize(
    "layer",
    ["LLaMAMLP", *(pytest.param(layer, marks=pytest.mark.slow) for layer in ("GptNeoxMLP", "FeedForward"))],
)
def test_moe_twin_and_back(layer):
    dense = BASE | {"mlp_class_name": layer, "intermediate_size": 256}
    moe = moe_twin(dense, 32, Experts(n_expert=16, granularity=4, n_shared_expert=1))
    assert (moe["n_expert"], moe["n_expert_per_token"], moe["n_shared_expert"]) == (16, 3, 1)
    routing = ("router_score_function", "norm_topk_prob", "router_bias_update_rate")
    assert [moe[name] for name in routing] == ["sigmoid", True, 0.01], "that of DeepSeek-V3"
    assert "intermediate_size" not in moe, "no layer has it"
    assert cost(moe, 32, "flops") == pytest.approx(cost(dense, 32, "flops"), rel=0.005)
    back = dense_twin(moe, 32)
    assert back["intermediate_size"] == pytest.approx(256, rel=0.03)


@pytest.mark.parametrize(("experts", "active"), [(Experts(8, 2, 1), 1), (Experts(3, 3), 3)])
def test_an_moe_twin_may_visit_one_expert_or_all(experts, active):
    dense = BASE | {"mlp_class_name": "LLaMAMLP", "intermediate_size": 96}
    moe = moe_twin(dense, 32, experts)
    assert (moe["n_expert"], moe["n_expert_per_token"]) == (experts.n_expert, active)
    assert cost(moe, 32, "flops") == pytest.approx(cost(dense, 32, "flops"), rel=0.005)


def test_what_has_no_twin_is_refused():
    with pytest.raises(SettingsError, match="--n_expert N"):
        dense_twin(BASE | {"mlp_class_name": "LLaMAMLP"}, 32)
    with pytest.raises(SettingsError, match="to have an MoE twin"):
        moe_twin(MOE, 32, Experts(8))
    with pytest.raises(SettingsError, match="granularity: 1 must be above"):
        moe_twin(BASE | {"mlp_class_name": "LLaMAMLP", "intermediate_size": 96}, 32, Experts(8, 1, 1))
    with pytest.raises(SettingsError, match="granularity: 5 must be above .* and at most"):
        moe_twin(BASE | {"mlp_class_name": "LLaMAMLP", "intermediate_size": 96}, 32, Experts(4, 5))
    with pytest.raises(SettingsError, match="write out the model"):
        twin_settings({"model_name": "pythia-14m"}, "flops")
    with pytest.raises(SettingsError, match="^model_config.n_head: 0 must be an integer of at least 1"):
        dense_twin(MOE | {"n_head": 0}, 32)
    with pytest.raises(
        SettingsError, match=r"^model_config.n_exprt: no setting has this name; did you mean n_expert\?"
    ):
        dense_twin(MOE | {"n_exprt": 4}, 32)
    with pytest.raises(SettingsError, match="^model_config.of_an_extension: no setting .* install the extension's"):
        moe_twin(BASE | {"mlp_class_name": "LLaMAMLP", "intermediate_size": 96, "of_an_extension": 1}, 32, Experts(8))
    with pytest.raises(SettingsError, match="^train: 5 must be"):
        twin_settings({"model_config": MOE, "train": 5}, "flops")
    with pytest.raises(SettingsError, match="^train.max_seq_length: 'long' must be an integer"):
        twin_settings({"model_config": MOE, "train": {"max_seq_length": "long"}}, "flops")
    with pytest.raises(SettingsError, match="^train.max_seq_length: 33 must be from 1 to the model's block_size: 32"):
        twin_settings({"model_config": MOE, "train": {"max_seq_length": 33}}, "flops")
    assert main(["train", "--config", str(QUICKSTART), "--dense_twin", "flops", "--train.max_seq_length=long"]) == 2


def test_a_mark_of_the_byte_order_stays_out_of_the_middle(tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "twin.yaml"
    recipe.write_text(QUICKSTART.read_text(), encoding="utf-8-sig")
    assert main(["twin", str(recipe), str(out)]) == 0
    assert "\ufeff" not in out.read_text(encoding="utf-8")


def test_the_name_of_a_recipe_may_have_lines(tmp_path):
    recipe, out = tmp_path / "a\nb.yaml", tmp_path / "twin.yaml"
    recipe.write_text(QUICKSTART.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["twin", str(recipe), str(out)]) == 0
    assert yaml.safe_load(out.read_text(encoding="utf-8"))["model_config"]["name"] == "quickstart-dense"


# Between them, these have everything: experts and none, with comments of a user's and without.
SOON = ("quickstart", "gpt-dense-fineweb")
RECIPES = [
    pytest.param(path, [], marks=[pytest.mark.slow] * (path.stem not in SOON), id=path.stem)
    for path in sorted((ROOT / "configs").glob("*.yaml"))
]
RECIPES.append(pytest.param(QUICKSTART, ["--by", "parameters"], id="by parameters"))


@pytest.mark.parametrize(("recipe", "options"), RECIPES)
def test_every_recipe_has_a_twin_with_its_comments(recipe, options, tmp_path):
    before = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    is_dense = before["model_config"]["mlp_class_name"] == "FeedForward"
    out = tmp_path / "twin.yaml"
    given = [*options, *(["--n_expert", "8"] if is_dense else [])]
    assert main(["twin", str(recipe), str(out), *given]) == 0
    text = out.read_text(encoding="utf-8")
    after = yaml.safe_load(text)
    by = "parameters" if options else "flops"
    assert after == twin_settings(before, by, Experts(8) if is_dense else None)
    suffix = "-moe" if is_dense else "-dense"
    assert after["out_dir"] == before["out_dir"] + suffix
    assert text.startswith(f"# The {'MoE' if is_dense else 'dense'} twin of {recipe.name}")
    _, _, rest = recipe.read_text(encoding="utf-8").partition("\nmodel_config:")
    rest = rest[re.search(r"\n(?=[^ \n])", rest).start() :]
    assert {line for line in rest.splitlines() if "#" in line} <= set(text.splitlines())
    assert "router_" not in text or is_dense
    if recipe == QUICKSTART:
        assert main(["twin", str(recipe), str(out), *given]) == 2


def test_one_flag_trains_the_same_twin():
    twin = read_settings(["--dense_twin", "flops", "--model_config.n_layer", "2"], QUICKSTART)
    model = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))["model_config"] | {"n_layer": 2}
    assert twin.model_config.intermediate_size == dense_twin(model, 256)["intermediate_size"]
    assert twin.model_config.mlp_class_name == "FeedForward"
    assert str(twin.out_dir) == "checkpoints/quickstart-dense"
    assert str(read_settings(["--dense_twin=flops", "--out_dir", "x"], QUICKSTART).out_dir) == "x"
    with pytest.raises(SettingsError, match="flops or parameters"):
        read_settings(["--dense_twin", "width"], QUICKSTART)
