"""Experts on cards that are not there: on no backend but the loop may an operator wait for the device."""

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.kernels import native
from litgpt_moe_ext.moe.kernels.plan import Outer
from litgpt_moe_ext.moe.kernels.routing import fused_router, router_product
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from tests.fake_cuda import CAPABILITIES, RECIPES, fake_cuda, forward_of_recipe
from tests.models import moe_config


def is_moe(recipe):
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))["model_config"].get("n_expert", 0) > 0


MOE_RECIPES = [recipe for recipe in RECIPES if is_moe(recipe)]


@pytest.fixture
def backends(monkeypatch):
    """The backends that computed experts."""
    chosen = []
    original = Experts.backend_for

    def spy(self, *args):
        chosen.append(original(self, *args))
        return chosen[-1]

    monkeypatch.setattr(Experts, "backend_for", spy)
    return chosen


@pytest.mark.parametrize("recipe", MOE_RECIPES, ids=lambda recipe: recipe.stem)
def test_no_recipe_waits_on_a_desktop_card(recipe, backends):
    with fake_cuda((8, 6)):
        assert forward_of_recipe(recipe, layers=2).shape[:2] == (1, 64)
    assert set(backends) == {"triton"}


@pytest.mark.parametrize(
    ("changed", "fast"),
    [
        ({}, True),
        ({"capability": (8, 9)}, False),
        ({"capability": (10, 0)}, False),
        ({"dtype": torch.float16}, False),
        # Of a first projection a token meets the outputs, of a second one the hidden units.
        ({"left": 512}, False),
        ({"left": 512, "gathers_left": True}, True),
        ({"right": 256}, True),
        ({"right": 256, "gathers_left": True}, False),
        ({"left": 1020}, False),
        ({"right": 1020}, False),
    ],
    ids=str,
)
def test_gradients_of_wide_weights_are_torch_products_on_hopper(changed, fast):
    case = {"capability": (9, 0), "dtype": torch.bfloat16, "left": 1024, "right": 768, "gathers_left": False} | changed
    with fake_cuda(case["capability"]):
        left, right = (torch.empty(8, case[side], dtype=case["dtype"], device="cuda") for side in ("left", "right"))
        outer = Outer(left, right, None, case["gathers_left"], not case["gathers_left"])
        assert native.sums_fast(outer) == fast


@pytest.mark.parametrize(
    ("changed", "ours"),
    [
        ({}, True),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float64}, False),
        ({"weight": torch.float64}, False),
        ({"tokens": 1023}, False),
        # A wide product has the more work to share.
        ({"tokens": 4096, "width": 260}, False),
        ({"tokens": 4096, "width": 512}, True),
        ({"tokens": 4095, "width": 512}, False),
        ({"experts": 65}, False),
        ({"experts": 17, "capability": (7, 5)}, False),
        ({"experts": 16, "capability": (7, 5)}, True),
        ({"experts": 17, "hip": "6.4"}, False),
        ({"experts": 16, "hip": "6.4"}, True),
    ],
    ids=str,
)
def test_small_products_of_routers_and_those_of_many_experts_are_torchs(changed, ours, monkeypatch):
    case = {"capability": (8, 0), "dtype": torch.bfloat16, "weight": torch.float32, "hip": None} | changed
    tokens, width, experts = (changed.get(*default) for default in (("tokens", 1024), ("width", 256), ("experts", 64)))
    monkeypatch.setattr(torch.version, "hip", case["hip"])
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    with fake_cuda(case["capability"]), torch.device("cuda"):
        x, weight = torch.empty(tokens, width, dtype=case["dtype"]), torch.empty(experts, width, dtype=case["weight"])
        assert router_product.works_on(x, weight) == ours


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("recipe", MOE_RECIPES, ids=lambda recipe: recipe.stem)
def test_no_recipe_waits_on_any_card(recipe, capability, backends):
    precision = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("precision") or "bf16-mixed"
    if capability < (8, 0) and precision.startswith("bf16"):
        pytest.skip("no bfloat16 on this card")
    with fake_cuda(capability):
        forward_of_recipe(recipe)
    native = capability[0] == 10 and precision.startswith("bf16")
    assert set(backends) == {"grouped_mm" if native else "triton"}


@pytest.mark.parametrize("backend", ["triton", "grouped_mm", "loop"])
@pytest.mark.parametrize("tokens", [64, 2])
def test_forced_backends(backend, tokens):
    """Decoding two tokens waits on none, not even on the loop; in training the loop waits."""
    config = moe_config(expert_backend=backend, moe_intermediate_size=16)
    with fake_cuda((9, 0)), torch.device("cuda"):
        moe, x = SharedExpertMoE(config), torch.randn(1, tokens, 16)
        with torch.no_grad():
            if backend == "loop" and tokens == 64:
                with pytest.raises(DataDependentOutputException):
                    moe(x)
            else:
                assert moe(x).shape == x.shape


def test_the_operators_are_counted_on_fake_tensors():
    with FakeTensorMode(), torch.device("cuda"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        experts = Experts(moe_config(moe_intermediate_size=24))
        routing = (torch.rand(40, 2), torch.zeros(40, 2, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
        from litgpt_moe_ext.moe.routing.router import Routing

        with FlopCounterMode(display=False) as counter:
            experts(torch.randn(40, 16), Routing(*routing))
    assert counter.get_total_flops() == 40 * 2 * 3 * 2 * 16 * 24


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)], ids=str)
def test_only_hoppers_empty_groups_are_zero(capability):
    with fake_cuda(capability):
        assert native.leaves_empty_groups(torch.device("cuda")) == (capability[0] != 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_float64_tokens_are_not_for_the_fused_router(dtype):
    """Neither are the logits that a float32 gate makes of them."""
    pytest.importorskip("triton")
    with fake_cuda((8, 6)), torch.device("cuda"):
        routing = SharedExpertMoE(moe_config()).gate(torch.randn(64, 16, dtype=dtype))
    assert (routing.decision is None) == (dtype == torch.float64)
