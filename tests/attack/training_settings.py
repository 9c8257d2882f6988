"""Which settings of a training are tried together: sizes, changes of a model, and changes of the rest of a recipe."""

import contextlib
import copy
import random
from typing import Any

from litgpt import GPT, Config

SIZES: dict[str, tuple[Any, ...]] = {
    "n_layer": (1, 2, 3),
    "n_embd": (16, 24, 40),
    "n_head": (4, 2, 1),
    "n_query_groups": (2, 4, 1),
    "head_size": (None, 8, 16),
    "block_size": (32, 17, 48),
    "padded_vocab_size": (304, 300, 403),
    "moe_intermediate_size": (8, 12, 17, 32),
}
"""What a model may have of everything; a value that does not go together with those before it is left out."""

BATCHES = ((4, 2), (4, 1), (4, 4), (2, 1), (6, 2), (6, 3))
"""Rows of a step, and of a micro-batch."""

_NO_SCORES: dict[str, Any] = {"norm_topk_prob": None, "router_bias_update_rate": None}
MODEL: tuple[dict[str, Any], ...] = (
    *({"mlp_activation": name} for name in ("clamped_swiglu", "geglu", "gelu", "relu", "relu2")),
    {"mlp_activation": "geglu", "gelu_approximate": "tanh"},
    {"router_type": "hash", **_NO_SCORES},
    *({"router_score_function": "softmax", "norm_topk_prob": value} for value in (True, False)),
    *({"n_expert": n, "n_expert_per_token": k} for n, k in ((2, 1), (3, 2), (4, 4), (5, 1), (16, 3), (40, 4))),
    {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1},
    {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2},
    *({"routed_scaling_factor": factor} for factor in (0.5, 2.5)),
    {"router_bias_update_rate": 0.0},
    {"router_bias_update_schedule": {"warmup_steps": 2, "decay_start": 3, "decay_steps": 2}},
    {"first_k_dense_replace": 1, "intermediate_size": 40},
    {"decoder_sparse_step": 2, "intermediate_size": 40},
    {"mlp_only_layers": [1], "intermediate_size": 33},
    *({"n_shared_expert": n} for n in (None, 2)),
    {"shared_expert_gate": True},
    {"shared_expert_intermediate_size": 20},
    {"router_bias": True},
    {"expert_gate_on_input": True},
    {"router_z_loss_coef": 0.01},
    {"router_sequence_balancing_loss_coef": 0.1},
    {"router_orthogonality_loss_coef": 0.1},
    {"router_importance_loss_coef": 0.1},
    {"router_load_balancing_loss_coef": 0.1},
    {"router_load_balancing_loss_coef": 0.1, "router_load_balancing_loss_scope": "global_batch"},
    {"attention_sinks": False},
    {"attention_sinks": [True, False]},
    {"attention_document_boundary": "eos", "attention_document_token_id": 0},
    {
        "attention_document_boundary": "bos",
        "attention_document_token_id": 0,
        "attention_document_restart_positions": True,
    },
    *({"sliding_window_size": size, "sliding_window_indices": [1, 0]} for size in (1, 9)),
    {"rope_adjustments": {"factor": 4.0, "original_max_seq_len": 16, "beta_fast": 32, "beta_slow": 1}},
    {"rope_local_base_freq": 300.0, "rope_indices": [0, 1]},
    {"rotary_percentage": 0.5},
    {"rope_interleave": True},
    {"position_embedding": "learned", "rotary_percentage": 0.0},
    {"attention_scores_scalar": 20},
    {"norm_qk": True},
    {"norm_qk": True, "norm_qk_type": "olmo2"},
    {"clip_qkv": 0.5},
    {"attn_bias": True},
    {"parallel_residual": True},
    {"post_attention_norm": True},
    {"post_mlp_norm": True},
    {"scale_embeddings": True},
    {"final_logit_softcapping": 5.0},
    {"lm_head_bias": True},
    {"bias": True},
    {"norm_class_name": "LayerNorm", "bias": True},
)
NOISE: tuple[dict[str, Any], ...] = (
    {"router_type": "uniform", **_NO_SCORES},
    {"router_type": "noisy_topk", **_NO_SCORES},
    {"router_type": "noisy_topk", "router_load_loss_coef": 0.1, **_NO_SCORES},
    {"router_jitter_noise": 0.1},
    *({f"{what}_dropout": 0.1} for what in ("expert", "residual", "attention", "embedding")),
)
"""Changes of a model that draw random numbers, which come to other tokens where the batch is cut in another way."""
IS_NOISY = 0.25
"""How many trainings have one of them."""

_SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}}
# A step of Adam is as long for a tiny gradient as for a large one: rounding would become a difference, but for `eps`.
_ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "eps": 1e-3}}
_MUON = {"class_path": "litgpt_moe_ext.training.optim.muon.MuonAdamW", "init_args": {"lr": 0.01, "eps": 1e-3}}
TRAINING: tuple[dict[str, Any], ...] = (
    {"train": {"tie_embeddings": True}},
    {"train": {"max_norm": 0.1}},
    {"fused_cross_entropy": True},
    *({"optimizer": optimizer} for optimizer in (_ADAMW, _MUON)),
    {"parameter_groups": {"no_weight_decay": ["norms", "biases", "embeddings"], "router_lr_factor": 0.1}},
    *({"schedule": {"name": name}} for name in ("wsd", "onecycle")),
    {"anomaly": {"spike_factor": 1.05, "window": 2}},
    {"ema": {"decay": 0.9}},
    *({"data": {"packing": name}} for name in ("pad", "best_fit")),
    *({"precision": name} for name in ("bf16-mixed", "bf16-true")),
    {"checkpoint": {"export": "hf"}},
)

RANDOM = ("noisy_topk", "uniform", "dropout", "jitter")
"""By what they are known."""
OF_MICRO_BATCHES = ("router_load_balancing_loss_coef", "router_importance_loss_coef", "router_load_loss_coef")
"""Losses of a micro-batch, which are others in other ones; that over the global batch knows only earlier ones."""


def random_sections(chance: random.Random, model: dict[str, Any]) -> dict[str, Any]:
    """Return sections of a recipe: sizes, up to five changes of the model that go together, up to three of the rest.

    Args:
        chance: What chooses.
        model: The model to change.
    """
    changes: dict[str, Any] = {}
    sizes = [{name: chance.choice(values)} for name, values in SIZES.items()]
    noise = [chance.choice(NOISE)] if chance.random() < IS_NOISY else []
    for change in (*sizes, *chance.sample(MODEL, chance.randint(0, 5)), *noise):
        changed = {**changes, **change}
        with contextlib.suppress(ValueError):  # of ours or of LitGPT's
            GPT(Config(**{k: v for k, v in copy.deepcopy({**model, **changed}).items() if v is not None}))
            changes = changed
    rows, micro_batch = chance.choice(BATCHES)
    sections: dict[str, Any] = {
        "model_config": changes,
        "train": {"global_batch_size": rows, "micro_batch_size": micro_batch},
        "optimizer": _SGD,
    }
    for change in chance.sample(TRAINING, chance.randint(0, 3)):
        for section, values in copy.deepcopy(change).items():
            own = sections.get(section)
            merges = isinstance(own, dict) and "class_path" not in own
            sections[section] = {**own, **values} if merges else values
    return sections
