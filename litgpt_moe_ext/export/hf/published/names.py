"""Alternative names of the entries of a `config.json`.

transformers accepts several names for an entry (`attribute_map` of a class) and saves the one that its version prefers:
`num_experts` of a Qwen3-MoE in 4 is saved as `num_local_experts` in 5.
"""

from typing import Any

# By architecture, and by the alternative name.
SYNONYMS = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "mixtral": {"num_experts": "num_local_experts"},
    "gpt_oss": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "olmoe": {"num_local_experts": "num_experts"},
    "ernie4_5_moe": {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    "glm4_moe": {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
}


def by_names_of_readers(model_type: str, entries: dict[str, Any]) -> dict[str, Any]:
    """Return entries by the names that `published.settings` reads; these names win over alternatives."""
    synonyms = SYNONYMS.get(model_type, {})
    renamed = {synonyms[name]: value for name, value in entries.items() if name in synonyms}
    return renamed | {name: value for name, value in entries.items() if name not in synonyms}
