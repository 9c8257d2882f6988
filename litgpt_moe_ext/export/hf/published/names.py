"""Names that entries of a `config.json` have besides those by which they are read here.

transformers takes an entry by several names (`attribute_map` of a class) and saves it by the one that its version
prefers: what 4 calls `num_experts` in a Qwen3-MoE, 5 saves as `num_local_experts`.
"""

from typing import Any

# By architecture, and by the other name.
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
    """Return entries by the names that `published.settings` reads; of two names for one, what stands by that counts."""
    synonyms = SYNONYMS.get(model_type, {})
    renamed = {synonyms[name]: value for name, value in entries.items() if name in synonyms}
    return renamed | {name: value for name, value in entries.items() if name not in synonyms}
