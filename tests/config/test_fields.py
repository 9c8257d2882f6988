"""The table of fields and the registries: one place from which everything else follows."""

import pytest
import torch
from litgpt import Config

from litgpt_moe_ext.config.fields import FIELDS, BiasSchedule, added_fields
from litgpt_moe_ext.config.litgpt_fields import check_ranges
from litgpt_moe_ext.config.types import check_field
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import PositiveInt
from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.batch_metadata import TokenIds
from litgpt_moe_ext.moe.layer import MoE, NoisyTopKMoE
from litgpt_moe_ext.moe.registry import ACTIVATIONS, LOSSES, ROUTERS, load
from litgpt_moe_ext.moe.routing.router import Router
from tests.models import moe_config, noisy_config, randomize


def test_litgpts_config_has_the_fields_and_leaves_them_unset():
    config = Config(intermediate_size=8, mlp_class_name="LLaMAMLP")
    unset = {name: field.unset for name, field in FIELDS.items()} | {
        "mlp_class_name": "LLaMAMLP",
        "intermediate_size": 8,
    }
    assert {name: getattr(config, name) for name in FIELDS} == unset
    assert all(unset[name] is None for name in added_fields())


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_has_what_its_entry_says(name):
    """Every loss whose needs its features meet works, and every other loss is refused."""
    features = ROUTERS[name].features
    for loss_name, loss in LOSSES.items():
        settings = {"router_type": name, f"router_{loss_name}_coef": 0.5}
        if not set(loss.needs) - {"choice"} <= features:
            with pytest.raises(
                ValueError, match=f"router_{loss_name}_coef: 0.5 would be ignored because router_type: {name}"
            ):
                moe_config(**settings)
            continue
        router = load(ROUTERS[name].router)(moe_config(**settings))
        randomize(router)(torch.randn(6, 16)).weights_TK.sum().backward()
        assert router.tally.take()[router.n_expert :].isfinite().all()
    router = randomize(load(ROUTERS[name].router)(moe_config(router_type=name)))
    assert isinstance(router, Router)
    ids = [TokenIds(torch.arange(6))] if "token_ids" in features else []
    choice = router.choose(torch.randn(6, 16), *ids)
    assert (choice.logits_TE is not None) == ("logits" in features)
    assert (choice.noisy_TE is not None) == ("noise" in features)
    if "sums_to_one" in features:
        torch.testing.assert_close(choice.weights_TK.sum(dim=-1), torch.ones(6))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gelu_approximate", ["none", "tanh"])
def test_an_activations_three_forms_agree(name, gelu_approximate):
    pointwise = Activation(name, gelu_approximate)._pointwise
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    upstream, out, gradient = torch.randn_like(x), torch.empty_like(x), torch.empty_like(x)
    y = pointwise.function(x)
    pointwise.forward_into(x.detach(), out)
    pointwise.backward_into(upstream, x.detach(), gradient)
    torch.testing.assert_close(out, y.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(y, x, upstream)[0])


def test_router_type_is_the_one_axis():
    noisy, moe = NoisyTopKMoE(noisy_config()), MoE(moe_config(mlp_class_name="MoE", router_type="noisy_topk"))
    moe.load_state_dict(randomize(noisy).state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(moe.eval()(x), noisy.eval()(x))
    assert noisy.gate.loss_coefs == moe.gate.loss_coefs == {"importance_loss": 0.1, "load_loss": 0.1}
    assert moe_config(mlp_class_name="MoE").router_type == moe_config().router_type == "topk"
    with pytest.raises(ValueError, match="router_type: 'topk' contradicts mlp_class_name: NoisyTopKMoE"):
        noisy_config(router_type="topk")


@pytest.mark.parametrize("indices", [5, [[1]], ["a", 0], [0, 2]])
def test_indices_of_layers_are_a_list_of_zeros_and_ones(indices):
    """LitGPT's own fields, which a damaged model_config.yaml may fill with anything."""
    with pytest.raises(SettingsError, match="^model_config.rope_indices"):
        check_ranges({"n_layer": 2, "rope_indices": indices}, "model_config.")


def test_groups_of_heads_may_be_left_to_litgpt():
    check_ranges({"n_head": 4, "n_query_groups": None})
    with pytest.raises(SettingsError, match="n_query_groups: 3 must divide n_head: 4; leave it out for 4"):
        check_ranges({"n_head": 4, "n_query_groups": 3})


def test_a_size_is_an_integer_that_tensors_can_have():
    check_field("n_embd", 2**31 - 1, PositiveInt)
    for value, words in ((2**31, "at least 1 and below 2**31; why"), (8.0, "at least 1; why")):
        with pytest.raises(SettingsError) as raised:
            check_field("n_embd", value, PositiveInt, "; why")
        assert str(raised.value) == f"n_embd: {value!r} must be an integer of {words}"
    with pytest.raises(SettingsError, match="^schedule.decay_steps: 8.0 must be an integer of at least 0$"):
        check_field("schedule", {"warmup_steps": 4, "decay_steps": 8.0}, BiasSchedule)
