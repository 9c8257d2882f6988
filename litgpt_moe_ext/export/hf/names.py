"""Names of tensors in the checkpoints of transformers: a table for each kind of class.

Shape legend: E experts, F their hidden width, D model width.
"""

from torch import Tensor

from litgpt_moe_ext.export.tensors import LAYER, TRANSPOSED, Layout, Names, Stored

_SWIGLU = {"fc_1": "gate_proj", "fc_2": "up_proj", "fc": "up_proj", "proj": "down_proj"}


def _swiglu(ours: str, theirs: str) -> Names:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _SWIGLU.items()}


def _experts(place: str, gate: str, up: str, down: str) -> Names:
    return {
        "mlp.experts.gate_up_proj": Stored((f"{place}.{{e}}.{gate}.weight", f"{place}.{{e}}.{up}.weight")),
        "mlp.experts.down_proj": f"{place}.{{e}}.{down}.weight",
    }


LLAMA: Names = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    LAYER: "model.layers",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.qkv": Stored(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "attn.norm_q": "self_attn.q_norm",
    "attn.norm_k": "self_attn.k_norm",
    "attn.proj": "self_attn.o_proj",
    "attn.sinks": "self_attn.sinks",
    "attn.q_a_proj": "self_attn.q_a_proj",
    "attn.q_a_norm": "self_attn.q_a_layernorm",
    "attn.q_b_proj": "self_attn.q_b_proj",
    "attn.kv_a_proj_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_a_norm": "self_attn.kv_a_layernorm",
    "attn.kv_b_proj": "self_attn.kv_b_proj",
    **_swiglu("mlp", "mlp"),
    "mlp.gate": "mlp.gate",
    **_experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    **_swiglu("mlp.shared_experts", "mlp.shared_experts"),
}
MIXTRAL: Names = LLAMA | {
    "mlp.gate": "block_sparse_moe.gate",
    **_experts("block_sparse_moe.experts", "w1", "w3", "w2"),
}
QWEN2_MOE: Names = LLAMA | {
    **_swiglu("mlp.shared_experts", "mlp.shared_expert"),
    "mlp.shared_expert_gate": "mlp.shared_expert_gate",
}
DEEPSEEK: Names = LLAMA | {"mlp.gate.e_score_correction_bias": "mlp.gate.e_score_correction_bias"}
ERNIE: Names = LLAMA | {
    "mlp.gate.e_score_correction_bias": Stored(
        ("mlp.moe_statics.e_score_correction_bias",),
        (Layout(lambda bias_E: bias_E.unsqueeze(0), lambda bias_1E: bias_1E.squeeze(0)),),
    ),
}


def _in_turns(rows: Tensor) -> Tensor:
    # (E, 2F, ...): gate rows above up rows, to alternating rows.
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _one_after_the_other(rows: Tensor) -> Tensor:
    return rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


# Linear maps are stored as (in, out), with gate and up rows alternating.
GPT_OSS: Names = LLAMA | {
    "mlp.gate": "mlp.router",
    "mlp.experts.gate_up_proj": Stored(
        ("mlp.experts.gate_up_proj",),
        (Layout(lambda w_EFD: _in_turns(w_EFD).mT, lambda w_EDF: _one_after_the_other(w_EDF.mT)),),
    ),
    "mlp.experts.gate_up_bias": Stored(("mlp.experts.gate_up_proj_bias",), (Layout(_in_turns, _one_after_the_other),)),
    "mlp.experts.down_proj": Stored(("mlp.experts.down_proj",), (TRANSPOSED,)),
    "mlp.experts.down_bias": "mlp.experts.down_proj_bias",
}
# For `modeling_litgpt_moe.py`: Llama's names, and ours for experts, which have another name if vLLM's cannot replace
# them.
OWN_BALANCING_BIAS = "balancing_bias"
_EXPERTS = ("gate_up_proj", "gate_up_bias", "up_proj", "up_bias", "down_proj", "down_bias")
OWN: Names = LLAMA | {
    "transformer.wpe": "model.embed_positions",
    "mlp.gate.e_score_correction_bias": f"mlp.gate.{OWN_BALANCING_BIAS}",
    "mlp.shared_expert_gate": "mlp.shared_expert_gate",
    **{f"mlp.experts.{name}": f"mlp.experts.{name}" for name in _EXPERTS},
}
OWN_PLAIN: Names = OWN | {f"mlp.experts.{name}": f"mlp.plain_experts.{name}" for name in _EXPERTS}
_CONV1D = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
GPT2: Names = {
    "transformer.wte": "transformer.wte",
    "transformer.wpe": "transformer.wpe",
    "transformer.ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
    LAYER: "transformer.h",
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    **{f"{ours}.bias": f"{theirs}.bias" for ours, theirs in _CONV1D.items()},
    **{f"{ours}.weight": Stored((f"{theirs}.weight",), (TRANSPOSED,)) for ours, theirs in _CONV1D.items()},
}
