"""Twins: the dense model with the cost per token of an MoE model, and vice versa.

The cost is counted by torch on tensors without memory, including router, shared experts, attention and output head. It
is linear in the hidden width of the feed-forward layers, so two models determine the width of the twin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from litgpt_moe_ext.config.features import LITGPT_ACTIVATIONS, MOE_CLASS_NAMES
from litgpt_moe_ext.config.fields import FEED_FORWARD_FIELDS, expert_fields
from litgpt_moe_ext.config.litgpt_fields import check_names, check_ranges
from litgpt_moe_ext.errors import SettingsError

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

Equality = Literal["flops", "parameters"]

# Largest relative difference between the costs of twins.
TOLERANCE = 0.005
# Multiples for widths that suit the hardware, the best first.
_MULTIPLES = (64, 32, 16, 8, 4, 2, 1)
# LitGPT has an MoE class of its own, always with this activation.
_LITGPT_MOE = "LLaMAMoE"


@dataclass(frozen=True)
class Experts:
    """Which experts an MoE twin has.

    Attributes:
        n_expert: Routed experts.
        granularity: Active experts per token, shared ones included; each is about this fraction (1 / granularity) of
            the dense layer.
        n_shared_expert: How many of these are shared by all tokens.
    """

    n_expert: int
    granularity: int = 2
    n_shared_expert: int = 0

    @property
    def n_expert_per_token(self) -> int:
        """Routed experts that a token visits."""
        return self.granularity - self.n_shared_expert


def dense_twin(model: dict[str, Any], length: int, by: Equality = "flops") -> dict[str, Any]:
    """Return the `model_config` of the dense model of the same cost per token, everything else equal.

    All layers have the same width, even if some of the MoE model's are dense.

    Args:
        model: `model_config` of a recipe with MoE layers.
        length: Tokens of a training sequence, which attention depends on.
        by: The cost that must be equal: the FLOPs of a training step, or the active parameters per token.

    Raises:
        SettingsError: If the model has no MoE layers, or no dense model comes within 0.5 % of its cost.
    """
    if not _is_moe(model):
        raise SettingsError(
            f"model_config.mlp_class_name: {model.get('mlp_class_name')} must be one of {', '.join(MOE_CLASS_NAMES)} "
            "to have a dense twin; `litgpt-moe twin RECIPE --n_expert N` makes an MoE model of a dense one"
        )
    check_names(model)  # also makes the fields of extensions known
    twin = without_experts(model)
    return _with_equal_cost(twin, "intermediate_size", model, partial(cost, length=length, by=by))


def moe_twin(model: dict[str, Any], length: int, experts: Experts, by: Equality = "flops") -> dict[str, Any]:
    """Return the `model_config` of an MoE model with the cost per token of a dense one, everything else equal.

    Its router is the package's usual one: sigmoid scores, normalised over the chosen experts, balanced by a bias.

    Args:
        model: `model_config` of a recipe with dense layers.
        length: Tokens of a training sequence.
        experts: The experts of the twin.
        by: The cost that must be equal, as in `dense_twin`.

    Raises:
        SettingsError: If the model has MoE layers already, its layer has no counterpart here, the numbers of experts
            contradict one another, or no width comes within 0.5 % of the dense model's cost.
    """
    name = model.get("mlp_class_name")
    if name != "FeedForward" and name not in LITGPT_ACTIVATIONS:
        known = ", ".join(("FeedForward", *LITGPT_ACTIVATIONS))
        raise SettingsError(f"model_config.mlp_class_name: {name} must be one of {known} to have an MoE twin")
    if not 0 < experts.n_expert_per_token <= experts.n_expert:
        raise SettingsError(
            f"granularity: {experts.granularity} must be above n_shared_expert ({experts.n_shared_expert}) and at most "
            f"that plus n_expert ({experts.n_expert}); a token visits granularity - n_shared_expert routed experts"
        )
    check_names(model)
    twin = {key: value for key, value in model.items() if key not in ("intermediate_size", *expert_fields())}
    if name in LITGPT_ACTIVATIONS:
        twin["mlp_activation"] = LITGPT_ACTIVATIONS[name]
    twin |= {
        "mlp_class_name": "MoE",
        "n_expert": experts.n_expert,
        "n_expert_per_token": experts.n_expert_per_token,
        "router_score_function": "sigmoid",
        "norm_topk_prob": True,
        "router_bias_update_rate": 0.01,
    }
    if experts.n_shared_expert:
        twin["n_shared_expert"] = experts.n_shared_expert
    return _with_equal_cost(twin, "moe_intermediate_size", model, partial(cost, length=length, by=by))


def without_experts(model: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a model with a dense layer, of a width still to be set, in place of its experts."""
    kept = {name: value for name, value in model.items() if name not in expert_fields()}
    return kept | {"mlp_class_name": "LLaMAMLP" if model["mlp_class_name"] == _LITGPT_MOE else "FeedForward"}


def cost(model: dict[str, Any], length: int, by: Equality) -> int:
    """Return the cost of a model: FLOPs of a training step on one sequence, or active parameters.

    Raises:
        SettingsError: If LitGPT or this package refuses the configuration.
    """
    from litgpt.config import Config as LitGPTConfig

    check_ranges(model, "model_config.")
    try:
        config = LitGPTConfig(**model)
    except (TypeError, ValueError, AssertionError) as error:  # raised by LitGPT and this package for wrong fields
        raise SettingsError(f"model_config: {model.get('name')!r} must be valid: {error}") from error
    return count(cast("Config", config), length, by)


def count(config: "Config", length: int, by: Equality) -> int:
    """Return the cost of a configuration; see `cost`."""
    from litgpt_moe_ext.inspect.cost.layers import shorten
    from litgpt_moe_ext.model_size import count_flops, count_parameters

    if by == "parameters":
        return shorten(config).extrapolate(lambda short: count_parameters(short).active)
    return shorten(config).extrapolate(partial(count_flops, length=length, training=True))


def _is_moe(model: dict[str, Any]) -> bool:
    return model.get("mlp_class_name") in (*MOE_CLASS_NAMES, _LITGPT_MOE)


def _with_equal_cost(
    twin: dict[str, Any], field: str, sibling: dict[str, Any], measure: Callable[[dict[str, Any]], int]
) -> dict[str, Any]:
    assert field in FEED_FORWARD_FIELDS
    target, narrow, wide = measure(sibling), measure({**twin, field: 64}), measure({**twin, field: 128})
    slope = (wide - narrow) / 64
    exact = 64 + (target - narrow) / slope
    widths = [max(1, round(exact / multiple)) * multiple for multiple in _MULTIPLES]
    close = (width for width in widths if abs(narrow + slope * (width - 64) - target) <= TOLERANCE * target)
    width = next(close, widths[-1])
    found = {**twin, field: width}
    reached = measure(found)
    if abs(reached - target) > TOLERANCE * target:
        raise SettingsError(
            f"model_config.{field}: {width} must bring the twin within {TOLERANCE:.1%} of {target:,}, but gives "
            f"{reached:,}; choose fewer or wider experts"
        )
    return found
