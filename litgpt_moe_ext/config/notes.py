"""What somebody who trains a model should know about its configuration, although nothing in it is wrong.

Imports neither torch nor LitGPT.
"""

from typing import TYPE_CHECKING

from litgpt_moe_ext.config.features import LITGPT_ACTIVATIONS, MOE_CLASS_NAMES, has_experts, routers_need
from litgpt_moe_ext.config.fields import FIELDS, expert_fields

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


def model_notes(config: "Config") -> list[str]:
    """Return what is surprising about a model, a line each."""
    notes = (_unlearned_routers(config), _unread_expert_fields(config), _experts_nowhere(config))
    return [note for note in notes if note is not None]


def _unlearned_routers(config: "Config") -> str | None:
    if config.n_expert_per_token != 1 or config.n_expert == 1 or not routers_need(config, "logits"):
        return None
    reads_norm = routers_need(config, "norm_topk_prob")
    if not (config.norm_topk_prob if reads_norm else routers_need(config, "sums_to_one")):
        return None
    setting = "norm_topk_prob: true" if reads_norm else f"router_type: {config.router_type}"
    return (
        f"n_expert_per_token: 1 with {setting} makes every gate value 1: routers learn from auxiliary losses, and "
        "nothing from the loss of the model"
    )


def _unread_expert_fields(config: "Config") -> str | None:
    # LitGPT takes them beside its dense classes, so they cannot be refused.
    if config.mlp_class_name not in LITGPT_ACTIVATIONS:
        return None
    fields = {name: field for name, field in FIELDS.items() if name in expert_fields()}
    given = [name for name, field in fields.items() if getattr(config, name, field.unset) != field.unset]
    if not given:
        return None
    settings = ", ".join(f"{name}: {getattr(config, name)}" for name in given)
    return f"mlp_class_name: {config.mlp_class_name} is a dense layer, without effect are {settings}"


def _experts_nowhere(config: "Config") -> str | None:
    # Each of the settings leaves an MoE layer by itself, or says openly that it leaves none; together they may not.
    if config.mlp_class_name not in MOE_CLASS_NAMES or any(has_experts(config, n) for n in range(config.n_layer)):
        return None
    names = ("n_layer", "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers")
    settings = ", ".join(f"{name}: {value}" for name in names if (value := getattr(config, name)))
    return f"mlp_class_name: {config.mlp_class_name} makes no MoE layer here, all are dense ({settings})"
