"""The plugin's MoE models as LitGPT's own `LLaMAMoE`, if that can express them.

`LLaMAMoE` has one module per expert, SwiGLU, and one of two routers: a softmax over the chosen logits, or, with groups,
DeepSeek-V3's sigmoid with a bias. The rest of the model (attention, norms) must be LitGPT's too, so that the result
opens without the plugin.
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt_moe_ext.config.features import MOE_CLASS_NAMES, has_sinks, router_type_of
from litgpt_moe_ext.config.fields import added_fields, uses_plugin
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.directory import new_directory, require_absent
from litgpt_moe_ext.export.litgpt_checkpoint import write_checkpoint
from litgpt_moe_ext.export.source import TRAINING_ONLY, read_source, without_negatives
from litgpt_moe_ext.moe.expert_layouts import unstack_experts
from litgpt_moe_ext.moe.registry import LOSSES, loss_field

# Fields that are checked one by one, and those that change only how the same is computed.
_EXPRESSED = {"router_type", "router_score_function", "mlp_activation", "decoder_sparse_step", "expert_backend"}


def obstacles(config: Any, state: dict[str, Tensor]) -> list[str]:
    """Return every reason why `LLaMAMoE` cannot express a model; empty if it can.

    Args:
        config: A `litgpt.Config`.
        state: The model's state dictionary.
    """
    if config.mlp_class_name not in MOE_CLASS_NAMES:
        return [f"mlp_class_name: {config.mlp_class_name} is none of {', '.join(MOE_CLASS_NAMES)}"]
    found = []
    if config.mlp_activation != "swiglu":
        found.append(f"mlp_activation: {config.mlp_activation}; LLaMAMoE has swiglu only")
    if config.decoder_sparse_step not in (None, 1):
        found.append(f"decoder_sparse_step: {config.decoder_sparse_step}; LLaMAMoE has dense layers at the start only")
    expressed = _EXPRESSED | ({"attention_class_name"} if _attends_as_litgpt(config) else set())
    for name in added_fields():
        if name not in expressed and not _is_for_training(name) and getattr(config, name):
            found.append(f"{name}: {getattr(config, name)!r}; LitGPT has no such setting")
    return found + _router_obstacles(config, state)


def _attends_as_litgpt(config: Any) -> bool:
    # `SinkAttention` computes YaRN differently, and works where LitGPT's windows end in an error.
    plain = config.rope_adjustments is None and config.sliding_window_size is None
    return plain and not any(has_sinks(config, block) for block in range(config.n_layer))


def _is_for_training(name: str) -> bool:
    # The converted model computes the same without these.
    losses = {loss_field(loss) for loss in LOSSES} | {"router_load_balancing_loss_scope"}
    return name in losses or name.startswith("router_bias_update") or name.endswith(("dropout", "jitter_noise"))


def _router_obstacles(config: Any, state: dict[str, Tensor]) -> list[str]:
    features = router_type_of(config).features
    if "softmax_of_chosen" in features:
        return []
    if "score_function" not in features:
        return [f"router_type: {config.router_type}; LLaMAMoE chooses the highest scores of a linear gate"]
    score = config.router_score_function
    if config.n_expert_groups:
        if score == "sigmoid":
            return []
        return [f"router_score_function: {score} with n_expert_groups; LLaMAMoE groups sigmoid scores only"]
    if score != "softmax":
        return [
            f"router_score_function: {score} without n_expert_groups; LLaMAMoE takes a softmax of the chosen logits"
        ]
    if not config.norm_topk_prob:
        return ["norm_topk_prob: False; LLaMAMoE's weights of the chosen experts sum to 1"]
    if any(tensor.any() for name, tensor in state.items() if name.endswith(_BIAS)):
        return ["e_score_correction_bias: not 0; LLaMAMoE without groups has no balancing bias"]
    return []


_BIAS = "gate.e_score_correction_bias"


def to_llama_moe(config: Any, state: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Return configuration and weights of the same model with `LLaMAMoE`.

    Args:
        config: A `litgpt.Config`.
        state: The model's state dictionary; the result has views of its tensors.

    Raises:
        SettingsError: If `LLaMAMoE` cannot express the model; the message names every setting.
    """
    if found := obstacles(config, state):
        raise SettingsError("LLaMAMoE cannot express this model. " + "; ".join(found))
    names = {field.name for field in dataclasses.fields(config)} - set(added_fields())
    fields = {name: getattr(config, name) for name in names}
    fields["mlp_class_name"] = "LLaMAMoE"
    converted = type(config)(**fields)
    dropped = (*TRAINING_ONLY, *(() if config.n_expert_groups else (_BIAS,)))
    kept = {name: tensor for name, tensor in unstack_experts(state).items() if not name.endswith(dropped)}
    return converted, {n: without_negatives(t) if n.endswith(_BIAS) else t for n, t in kept.items()}


def convert_checkpoint(checkpoint_dir: Path, out_dir: Path) -> None:
    """Write a checkpoint directory with `LLaMAMoE` layers.

    Args:
        checkpoint_dir: A checkpoint with MoE layers of this package.
        out_dir: The new directory; it appears only once everything in it is written.

    Raises:
        SettingsError: If `checkpoint_dir` has no whole checkpoint, if `out_dir` exists, or if `LLaMAMoE` cannot express
            the model.
    """
    require_absent(out_dir)
    source = read_source(checkpoint_dir)
    converted, state = to_llama_moe(source.config, source.state)
    assert not uses_plugin(converted)
    with new_directory(out_dir, source.nbytes(None)) as partial:
        write_checkpoint(partial, converted, state.items(), checkpoint_dir)
