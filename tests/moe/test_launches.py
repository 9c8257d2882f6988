"""How many operations a forward pass starts: on a GPU, small models wait for launches more than for arithmetic."""

import itertools
import math
import re

import litgpt.model
import pytest
import torch
import yaml
from lightning import Fabric
from litgpt import Config
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.moe.batch_metadata import TokenIds
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from litgpt_moe_ext.moe.routing.fixed_routers import FixedRouter
from litgpt_moe_ext.tokens import padding
from tests.fake_cuda import DTYPES, RECIPES, fake_cuda
from tests.models import initialized_model, moe_config, randomize
from tests.moe.routers import RULES
from tests.runs import ROOT

# These only describe memory in another way, or reserve it.
FREE = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "split", "chunk", "unbind", "detach"),
    *("alias", "permute", "unsqueeze", "squeeze", "as_strided", "empty", "empty_like", "empty_strided", "new_empty"),
    *("promote_types", "split_with_sizes", "device", "narrow"),
}
KERNELS = (
    *("activation", "biases", "combining", "decoding", "gating", "orthogonality", "projecting"),
    *("routing.launches", "rows", "weights"),
)
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
GROUPS = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1}


class Launches(TorchDispatchMode):
    """Collects the names of all operations that would start a kernel.

    Args:
        inside: Whether to look into the package's own operators, as they are on a card, at what they start.
    """

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if self.inside and func.namespace == "litgpt_moe_ext":
            return self._look_inside(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        unchanged = name in ("to", "contiguous", "reshape") and result is args[0]
        if name not in FREE and not unchanged:
            self.names.append(name)
        return result

    def _look_inside(self, func, args, kwargs):
        def launch(kernel, grid, arguments, warps, stages=1):
            self.names.append(kernel.fn.__name__)

        with pytest.MonkeyPatch.context() as patch, self:
            for module in KERNELS:
                patch.setattr(f"litgpt_moe_ext.moe.kernels.triton.{module}.launch", launch)
            return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)


def make_layer(config, padded, size=(8, 2048)):
    """Return a layer on the GPU that is there or faked, and what it is called with, of which numbers do not matter."""
    with torch.device("cuda"):
        moe = getattr(litgpt.model, config.mlp_class_name)(config)
        x = torch.empty(*size, config.n_embd, requires_grad=True)
        real = torch.ones(size, dtype=torch.bool) if padded else None
        ids = None
        if isinstance(moe.gate, FixedRouter):
            ids = TokenIds(torch.zeros(math.prod(size), dtype=torch.int64))
            ids.hashes(config.n_expert)  # by the first layer
    return moe, (x, real, ids)


def launches_of_layer(config, capability, precision="bf16-mixed", padded=False, size=(8, 2048)):
    """Return what an MoE layer starts on a card, in training."""
    kind, _, mode = precision.partition("-")
    assert mode == "mixed"
    with fake_cuda(capability):
        with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True):
            moe, inputs = make_layer(config, padded, size)
        moe.gate.tally.leaf_on(inputs[0].device)  # made once
        with torch.autocast("cuda", DTYPES[kind]), Launches(inside=True) as launches:
            moe(*inputs)
    return launches.names


def launches_where_most(settings, padded):
    """Return the same for settings on the card where experts take most, whose products are torch's."""
    pytest.importorskip("triton")
    return launches_of_layer(moe_config(n_embd=256, moe_intermediate_size=64, **settings), (10, 0), padded=padded)


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)], ids=str)
@pytest.mark.parametrize("recipe", [r for r in RECIPES if "n_expert:" in r.read_text()], ids=lambda r: r.stem)
def test_the_layer_of_every_recipe_starts_at_most_25_kernels(recipe, capability):
    """Router, losses, statistics and shared experts included; casts of weights too, which autocast does once a pass."""
    pytest.importorskip("triton")
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    names = launches_of_layer(Config(**settings["model_config"]), capability, settings.get("precision") or "bf16-mixed")
    assert len(names) <= 25, names
    assert {"_project", "route_block", "sum_up", "place_rows"} <= set(names)
    assert "silu" not in names


@pytest.mark.parametrize("padded", [False, True], ids=["text", "padding"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_takes_the_fused_router(name, padded):
    """Every loss, noise and groups: as many as without any of it."""
    names = launches_where_most(RULES[name], padded)
    beside = 2 * ("noisy" in name) + 2 * ("router_orthogonality_loss_coef" in RULES[name])
    assert len(names) == (15 if padded else 13) + beside, names
    assert {"_project", "route_block", "sum_up", "place_rows"} <= set(names)
    assert names.count("to") == 2  # weights of the experts; the router passes tokens on in 16 bits


def test_few_tokens_are_added_up_and_sorted_in_one():
    """As many as a step of the quickstart has."""
    config = moe_config(n_embd=256, moe_intermediate_size=64)
    few, many = (launches_of_layer(config, (9, 0), size=(n, 256)) for n in (8, 64))
    at = many.index("sum_up")
    assert many[at : at + 2] == ["sum_up", "place_rows"]
    assert few == [*many[:at], "sum_up_and_place", *many[at + 2 :]]


GATED = {"n_shared_expert": 1, "shared_expert_gate": True}
SEQUENCES = {"router_sequence_balancing_loss_coef": 1e-4}
ORTHOGONALITY = {"router_orthogonality_loss_coef": 0.01}
LAYERS = {
    "shared": {"n_shared_expert": 2},
    "shared, biases, router's bias": {"n_shared_expert": 1, "bias": True, "router_bias": True},
    "gated shared, biases, orthogonality": {**GATED, **ORTHOGONALITY, "bias": True},
    "gated shared, sequences": {**GATED, **SEQUENCES, "norm_topk_prob": True, **GROUPS},
    "jitter, bias of the router, dropout": {"router_jitter_noise": 0.1, "router_bias": True, "expert_dropout": 0.1},
    "gate on input": {"expert_gate_on_input": True},
    "gate on input, shared": {"expert_gate_on_input": True, "n_shared_expert": 1},
    "gate on input of one, shared (Llama 4)": {
        "expert_gate_on_input": True,
        "n_expert_per_token": 1,
        "n_shared_expert": 1,
    },
    "hash": {"router_type": "hash"},
    "uniform": {"router_type": "uniform"},
    "biases, clamped (GPT-OSS)": {"bias": True, "router_bias": True, "mlp_activation": "clamped_swiglu"},
}


def test_many_experts_and_tokens_take_one_more():
    """Several programs add up what one would read for long."""
    few, many = (launches_where_most({"n_expert": n_expert, "n_shared_expert": 1}, False) for n_expert in (64, 128))
    assert "sum_blocks" not in few
    many.remove("_to_copy")  # of the tokens, which torch's product of so many does not pass on
    assert many[many.index("route_block") :] == ["route_block", "sum_blocks", *few[few.index("sum_up") :]]
    assert len(many) <= 25


@pytest.mark.parametrize("padded", [False, True], ids=["text", "padding"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_starts_at_most_25_kernels(name, padded):
    names = launches_where_most(LAYERS[name], padded)
    assert len(names) <= 25, names


# What each adds to a layer, by its own operators.
SETTINGS = {
    "n_shared_expert": 1, "shared_expert_gate": True, "bias": True, "router_bias": True, "router_jitter_noise": 0.1,
    "router_type": "noisy_topk", "router_orthogonality_loss_coef": 0.1, "expert_dropout": 0.1,
    "expert_gate_on_input": True, "padding": True,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "n_setting"), [((8, 6), 4), ((10, 0), 3)], ids=str)
def test_so_many_settings_at_once_start_at_most_25_kernels(capability, n_setting):
    pytest.importorskip("triton")
    for names in itertools.combinations(SETTINGS, n_setting):
        settings = {name: SETTINGS[name] for name in names}
        if "shared_expert_gate" in settings and "n_shared_expert" not in settings:
            continue
        padded = settings.pop("padding", False)
        config = moe_config(n_embd=256, moe_intermediate_size=64, **settings)
        started = launches_of_layer(config, capability, padded=padded)
        assert len(started) <= 25, (names, started)


def test_all_of_these_settings_start_what_the_pages_say():
    pytest.importorskip("triton")
    settings = {name: value for name, value in SETTINGS.items() if name != "padding"}
    config = moe_config(n_embd=256, moe_intermediate_size=64, **settings)
    on_8, on_10 = (len(launches_of_layer(config, capability, padded=True)) for capability in ((8, 6), (10, 0)))
    page = (ROOT / "docs" / "how-to" / "one-gpu.md").read_text(encoding="utf-8")
    assert f"All at once are {on_8}, on 10.x {on_10}." in page
    assert f"All ten start {on_8} and {on_10}." in RESULTS.read_text(encoding="utf-8")


def rows_of(header):
    """Yield the cells of each row of a table of the measured results."""
    table = RESULTS.read_text(encoding="utf-8").split(f"\n{header}\n")[1].split("\n\n")[0]
    for row in table.splitlines()[1:]:
        yield [cell.strip() for cell in row.strip("|").split("|")]


def test_the_layers_of_recipes_start_what_the_results_say():
    pytest.importorskip("triton")
    found, said = {}, {}
    for names, *counts in rows_of("| recipe | 8.6 and 9.0 | 10.0 |"):
        for name in re.findall(r"[\w-]+", names.partition(" (")[0]):
            settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
            config, precision = Config(**settings["model_config"]), settings.get("precision") or "bf16-mixed"
            found[name] = [len(launches_of_layer(config, capability, precision)) for capability in ((8, 6), (10, 0))]
            said[name] = list(map(int, counts))
    assert found == said
    assert len(said) == sum("n_expert:" in recipe.read_text() for recipe in RECIPES)


# Settings of the rows of the second table of launches, in their order.
GATED_ON_INPUT = {"expert_gate_on_input": True}
ROWS = [
    {},
    {**SEQUENCES, "router_load_balancing_loss_coef": 0.01},
    {**SEQUENCES, "router_load_balancing_loss_coef": 0.01, "router_z_loss_coef": 1e-3, **GROUPS},
    {"router_type": "hash"},
    {"mlp_activation": "clamped_swiglu"},
    {"router_type": "noisy_topk"},
    {"bias": True},
    ORTHOGONALITY,
    GATED_ON_INPUT,
    {**GATED_ON_INPUT, "n_expert_per_token": 1},
    GATED,
    {**GATED, "bias": True},
    {**GATED, **ORTHOGONALITY},
    {**GATED, **ORTHOGONALITY, "bias": True},
]


def test_layers_start_what_the_results_say():
    pytest.importorskip("triton")
    found, said = [], []
    for settings, (_, *counts) in zip(
        ROWS, rows_of("| setting | 8.6 | 10.0 | with shared experts, 8.6 | 10.0 |"), strict=True
    ):
        said.append(counts)
        found.append(["" if not count else launches_with_padding(settings, i) for i, count in enumerate(counts)])
    assert found == said


def launches_with_padding(settings, column):
    """Return a cell of that table: launches, and in brackets those with padding."""
    shared = {"n_shared_expert": 1} if column >= 2 else {}
    config = moe_config(n_embd=256, moe_intermediate_size=512, **{**shared, **settings})
    plain, padded = (len(launches_of_layer(config, ((8, 6), (10, 0))[column % 2], padded=p)) for p in (False, True))
    return f"{plain} ({padded})"


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"norm_topk_prob": True}, 13),
        ({"router_score_function": "softmax", "norm_topk_prob": True}, 14),
        ({"norm_topk_prob": True, "routed_scaling_factor": 2.5, **GROUPS}, 20),
        ({"router_type": "noisy_topk", "router_importance_loss_coef": 0.0, "router_load_loss_coef": 0.0}, 15),
    ],
    ids=str,
)
def test_a_router_starts_few_kernels(settings, most):
    gate = randomize(SharedExpertMoE(moe_config(**settings))).gate
    x = torch.randn(12, 16, dtype=torch.bfloat16, requires_grad=True)
    with Launches() as launches:
        gate(x)
    assert len(launches.names) <= most, launches.names


def test_a_layer_starts_few_kernels():
    """Eighteen here, two of them operators that start seven kernels on a card: no more than 25 in all."""
    moe = randomize(SharedExpertMoE(moe_config(norm_topk_prob=True, moe_intermediate_size=16)))
    moe.experts.forced_backend = "grouped_mm"
    x = torch.randn(2, 6, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Launches() as launches:
        moe(x)
    assert len(launches.names) <= 18, launches.names
    assert [name for name in launches.names if name.startswith("expert_")] == ["expert_up", "expert_down"]


def test_the_layers_of_a_model_share_the_hashes_of_its_tokens():
    model, ids = initialized_model(moe_config(router_type="hash", n_layer=3)), torch.randint(0, 64, (2, 6))
    for _ in range(2):
        with Launches() as launches:
            model(ids)
        assert launches.names.count("__rshift__") == 3
        assert launches.names.count("topk") == 3


def test_a_batch_without_padding_starts_none_for_it(monkeypatch):
    """Whether padding is accepted or not: the same operations, in the same order, beside the look at the ids."""
    model, ids = initialized_model(moe_config()), torch.randint(0, 64, (2, 6))
    names = []
    for accepted in (False, True):
        monkeypatch.setattr(padding, "_accepted", accepted)
        with Launches() as launches:
            model(ids)
        names.append(launches.names)
    assert names[1] == ["ge", "all", "_local_scalar_dense", *names[0]]


def test_a_norm_is_one_kernel_in_models_of_this_package_only():
    counts = {}
    for name in ("SharedExpertMoE", "LLaMAMoE"):
        config = moe_config(mlp_class_name=name, norm_class_name="RMSNorm", n_expert=4, n_expert_per_token=2)
        with fake_cuda(), torch.device("cuda"):
            model = litgpt.model.GPT(config)
            x = torch.empty(2, 8, config.n_embd)
            with Launches() as launches:
                model.transformer.ln_f(x)
        counts[name] = len(launches.names)
    assert counts["SharedExpertMoE"] == 1
    assert counts["LLaMAMoE"] >= 5


def test_a_norm_that_adds_one_to_its_weights_is_not_fused():
    for name, fusible in (("Gemma", False), ("Llama", True)):
        with torch.device("meta"):
            model = litgpt.model.GPT(moe_config(name=name, norm_class_name="RMSNorm"))
        assert model.transformer.ln_f.is_fusible is fusible
