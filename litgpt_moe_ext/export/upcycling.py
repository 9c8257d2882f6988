"""Turns a dense model into a Mixture-of-Experts model that computes the same function.

Sparse upcycling (Komatsuzaki et al., arXiv:2212.05055) copies the dense MLP into every expert. Whatever experts a token
visits, the output is that of the dense model as long as the gate values sum to 1. An expert may also be a slice of the
hidden units: then the experts of one copy form a virtual group (He et al., arXiv:2410.07524) whose rows in the router
are equal, so that a token visits whole copies only. Shared experts, which every token visits, take hidden units of
their own.

Shape legend: D model width, W hidden width of the dense MLP, F hidden width of one routed expert, S hidden width of the
shared experts together, E experts, C copies of the dense MLP, M slices of a copy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from litgpt_moe_ext.config.features import (
    LITGPT_ACTIVATIONS,
    MOE_CLASS_NAMES,
    family_of_norms,
    is_dense_layer,
    router_type_of,
)
from litgpt_moe_ext.config.fields import FIELDS
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.directory import new_directory, require_absent
from litgpt_moe_ext.export.litgpt_checkpoint import write_checkpoint
from litgpt_moe_ext.export.source import read_source
from litgpt_moe_ext.meta.models import meta_model
from litgpt_moe_ext.moe.layer import MoE
from litgpt_moe_ext.moe.routing.learned_routers import LearnedRouter
from litgpt_moe_ext.moe.routing.router import Router

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# Other fields that may differ between the two configurations.
_MAY_DIFFER = {"name", "hf_config", "mlp_class_name", "mlp_activation", "intermediate_size", "residual_dropout"}


class Slices(NamedTuple):
    """Which hidden units of the dense MLP each expert gets: the first `shared`, then `per_expert` in turns.

    Attributes:
        shared: S.
        per_expert: F.
        per_copy: M.
        copies: C.
    """

    shared: int
    per_expert: int
    per_copy: int
    copies: int


def upcycle(dense_dir: Path, out_dir: Path, config: "Config", seed: int = 42) -> None:
    """Write a checkpoint of an MoE model that computes the same function as a dense model.

    `litgpt-moe train --initial_checkpoint_dir OUT_DIR` starts a training from it. `litgpt convert_to_litgpt` turns a
    Hugging Face model into a dense checkpoint.

    Args:
        dense_dir: A LitGPT checkpoint directory of a dense model.
        out_dir: Where to write the new one; must not exist.
        config: The MoE model. It may differ from the dense model only in its MLP.
        seed: Seed of the routers' weights.

    Raises:
        SettingsError: If `dense_dir` has no whole checkpoint, if `out_dir` exists, or if no MoE model of this
            configuration computes the same function, with the reason.
    """
    require_absent(out_dir)
    dense = read_source(dense_dir, "dense_dir")
    require_same_function(dense.config, config)
    size = sum(tensor.numel() for tensor in meta_model(config).state_dict().values()) * dense.dtype.itemsize
    with new_directory(out_dir, size) as partial:
        write_checkpoint(partial, config, upcycled_weights(dense.state, dense.config, config, seed), dense_dir)


def require_same_function(dense: "Config", moe: "Config") -> Slices:
    """Return how to divide the dense MLP so that the MoE model computes the same function.

    Args:
        dense: Configuration of the dense model.
        moe: Configuration of the MoE model.

    Raises:
        SettingsError: If that is impossible, with the reason.
    """
    if moe.mlp_class_name not in MOE_CLASS_NAMES:
        raise SettingsError(f"mlp_class_name: {moe.mlp_class_name!r} must be one of {', '.join(MOE_CLASS_NAMES)}")
    activation = dense.mlp_activation or LITGPT_ACTIVATIONS.get(dense.mlp_class_name)
    if dense.mlp_class_name in MOE_CLASS_NAMES or activation is None:
        raise SettingsError(f"dense_dir: its mlp_class_name is {dense.mlp_class_name!r}, which is not a dense MLP")
    if moe.mlp_activation != activation:
        raise SettingsError(f"mlp_activation: {moe.mlp_activation!r} must be {activation!r} as in the dense model")
    family, wanted = (family_of_norms(config.norm_class_name, config.name) for config in (moe, dense))
    if family != wanted:
        raise SettingsError(
            f"name: {moe.name!r} must be {'with' if wanted else 'without'} {wanted or family!r} as in the dense model, "
            f"{dense.name!r}: LitGPT makes norms of that family because of it"
        )
    theirs = asdict(dense)
    for name, value in asdict(moe).items():
        may_differ = name in _MAY_DIFFER or (name in FIELDS and "moe" in FIELDS[name].owner)
        if not may_differ and value != theirs[name]:
            raise SettingsError(f"{name}: {value!r} must be {theirs[name]!r} as in the dense model")
    has_dense_layers = any(is_dense_layer(moe, i) for i in range(moe.n_layer))
    if has_dense_layers and moe.intermediate_size != dense.intermediate_size:
        raise SettingsError(
            f"intermediate_size: {moe.intermediate_size} must be {dense.intermediate_size} as in the dense model; "
            "layers that stay dense have this width"
        )
    if moe.expert_gate_on_input:
        raise SettingsError(
            "expert_gate_on_input: True divides what copies of the dense MLP get, so that they do not add up to it; "
            "remove it"
        )
    _require_gates_that_sum_to_one(moe)
    return _slices(dense.intermediate_size or 0, moe)


def _require_gates_that_sum_to_one(moe: "Config") -> None:
    features = router_type_of(moe).features
    if "sums_to_one" in features or moe.norm_topk_prob:
        return
    # The softmax scores of all experts together sum to 1 too.
    if moe.router_score_function == "softmax" and moe.n_expert_per_token == moe.n_expert:
        return
    if "norm_topk_prob" not in features:
        raise SettingsError(
            f"router_type: {moe.router_type} has gate values that do not sum to 1, so copies of the dense MLP "
            "would not add up to it; choose another router"
        )
    raise SettingsError(
        "norm_topk_prob: False does not make the gate values of a token sum to 1, so copies of the dense MLP would not "
        "add up to it; set norm_topk_prob: true"
    )


def _slices(dense_width: int, moe: "Config") -> Slices:
    per_expert, shared = moe.moe_intermediate_size or 0, 0
    if moe.n_shared_expert:
        shared = moe.shared_expert_intermediate_size or moe.n_shared_expert * per_expert
    routed = dense_width - shared
    if routed < per_expert or routed % per_expert:
        raise SettingsError(
            f"moe_intermediate_size: {per_expert} must divide the {routed} hidden units left for the routed "
            f"experts (the dense model has {dense_width}, the shared experts take {shared})"
        )
    slices = Slices(shared, per_expert, routed // per_expert, moe.n_expert * per_expert // routed)
    if slices.per_copy > 1:
        _require_whole_copies(moe, slices.per_copy)
    return slices


def _require_whole_copies(moe: "Config", per_copy: int) -> None:
    why = f"{per_copy} experts make one copy of the dense MLP"
    for name in ("n_expert", "n_expert_per_token"):
        if getattr(moe, name) % per_copy:
            raise SettingsError(f"{name}: {getattr(moe, name)} must be a multiple of {per_copy}: {why}")
    if "copies" not in router_type_of(moe).features:
        raise SettingsError(
            f"moe_intermediate_size: {moe.moe_intermediate_size}: {why}, and this router would not choose them "
            "together; router_type: topk does"
        )
    if moe.n_expert_groups is not None and moe.n_expert // moe.n_expert_groups % per_copy:
        raise SettingsError(f"n_expert_groups: {moe.n_expert_groups} groups cut copies apart: {why}")


def upcycled_weights(
    dense: Mapping[str, Tensor], dense_config: "Config", config: "Config", seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of the MoE model, layer by layer.

    Args:
        dense: State dictionary of the dense model.
        dense_config: Its configuration.
        config: Configuration of the MoE model.
        seed: Seed of the routers' weights.

    Raises:
        SettingsError: See `require_same_function`.
    """
    slices = require_same_function(dense_config, config)
    left = dict(dense)
    generator = torch.Generator().manual_seed(seed)
    for index, block in enumerate(meta_model(config).get_submodule("transformer.h").children()):
        if isinstance(moe := block.get_submodule("mlp"), MoE):
            prefix = f"transformer.h.{index}.mlp."
            mlp = {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}
            layer = _Layer(mlp, slices, config).weights(moe, generator)
            yield from ((prefix + name, tensor) for name, tensor in layer.items())
    yield from left.items()


class _Layer:
    # From the weights of one dense MLP to the weights of the MoE layer that replaces it.

    def __init__(self, mlp: dict[str, Tensor], slices: Slices, config: "Config") -> None:
        self._mlp, self._slices, self._config = mlp, slices, config
        self._dtype = mlp["proj.weight"].dtype

    def weights(self, moe: MoE, generator: torch.Generator) -> dict[str, Tensor]:
        parts = {"experts.": self._experts(moe), "gate.": self._router(moe.gate, generator)}
        if moe.shared_experts is not None:
            parts["shared_experts."] = self._shared(moe)
        if moe.shared_expert_gate is not None:
            parts["shared_expert_gate."] = {"weight": torch.zeros(1, self._config.n_embd, dtype=self._dtype)}
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}

    def _experts(self, moe: MoE) -> dict[str, Tensor]:
        slices, scale = self._slices, self._config.routed_scaling_factor
        up, names = ("gate_up", ("fc_1", "fc_2")) if moe.experts.activation.gated else ("up", ("fc",))
        begins = range(slices.shared, slices.shared + slices.per_copy * slices.per_expert, slices.per_expert)
        units = [slice(begin, begin + slices.per_expert) for begin in begins]

        def copied(parts: list[Tensor]) -> Tensor:
            return torch.stack(parts).repeat(slices.copies, *(1,) * parts[0].dim())

        result = {
            f"{up}_{ours}": copied(
                [torch.cat([self._mlp[f"{name}.{theirs}"][unit] for name in names]) for unit in units]
            )
            for ours, theirs in (("proj", "weight"), ("bias", "bias"))
            if theirs == "weight" or self._config.bias
        }
        # The gate value of a copy is divided evenly among its experts.
        result["down_proj"] = copied([self._mlp["proj.weight"][:, unit] * (slices.per_copy / scale) for unit in units])
        if self._config.bias:
            # Shared experts, if any, have it instead.
            bias_D = self._mlp["proj.bias"] * (0.0 if slices.shared else 1 / scale)
            result["down_bias"] = bias_D.repeat(self._config.n_expert, 1)
        return result

    def _shared(self, moe: MoE) -> dict[str, Tensor]:
        # A gate without weights is sigmoid(0) = 1/2 for every token.
        factor = 1.0 if moe.shared_expert_gate is None else 2.0
        result = {name: t[: self._slices.shared] for name, t in self._mlp.items() if name.startswith("fc")}
        result["proj.weight"] = self._mlp["proj.weight"][:, : self._slices.shared] * factor
        if self._config.bias:
            result["proj.bias"] = self._mlp["proj.bias"] * factor
        return {name: tensor.clone() for name, tensor in result.items()}

    def _router(self, gate: Router, generator: torch.Generator) -> dict[str, Tensor]:
        # Balancing biases and counters, and the weights of the noise, start at zero.
        result = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in gate.state_dict().items()}
        if isinstance(gate, LearnedRouter):
            copies_CD = torch.empty(self._slices.copies, self._config.n_embd)
            nn.init.normal_(copies_CD, std=gate.init_std, generator=generator)
            result["weight"] = copies_CD.repeat_interleave(self._slices.per_copy, dim=0).to(self._dtype)
        return result
