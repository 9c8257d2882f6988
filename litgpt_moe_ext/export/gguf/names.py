"""Names of tensors in GGUF files: a table for each kind of llama.cpp's graphs.

Experts are stacked as `(E, F, D)`, with gate and up projections apart.

Shape legend: E experts, F their hidden width, D model width, H heads, d width of a head, expanded from latent width R.
"""

from litgpt_moe_ext.export.tensors import LAYER, TRANSPOSED, Layout, Names, Stored

_SWIGLU = {"fc_1": "ffn_gate", "fc_2": "ffn_up", "proj": "ffn_down"}

DECODER: Names = {
    "transformer.wte": "token_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
    LAYER: "blk",
    "norm_1": "attn_norm",
    "norm_2": "ffn_norm",
    "attn.qkv": Stored(("attn_q", "attn_k", "attn_v")),
    "attn.norm_q": "attn_q_norm",
    "attn.norm_k": "attn_k_norm",
    "attn.proj": "attn_output",
    "attn.sinks": "attn_sinks.weight",
    "attn.q_a_proj": "attn_q_a",
    "attn.q_a_norm": "attn_q_a_norm",
    "attn.q_b_proj": "attn_q_b",
    "attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "attn.kv_a_norm": "attn_kv_a_norm",
    # The graph multiplies queries by the part for keys, (H, R, d), and so attends to unexpanded latent keys.
    "attn.kv_b_proj": Stored(("attn_k_b", "attn_v_b"), (TRANSPOSED,)),
    **{f"mlp.{ours}": theirs for ours, theirs in _SWIGLU.items()},
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": Stored(("ffn_gate_exps.weight", "ffn_up_exps.weight"), dim=1),
    "mlp.experts.gate_up_bias": Stored(("ffn_gate_exps.bias", "ffn_up_exps.bias"), dim=1),
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_bias": "ffn_down_exps.bias",
    **{f"mlp.shared_experts.{ours}": f"{theirs}_shexp" for ours, theirs in _SWIGLU.items()},
    # The single gate of all shared experts is a vector.
    "mlp.shared_expert_gate": Stored(
        ("ffn_gate_inp_shexp",), (Layout(lambda w_1D: w_1D.squeeze(0), lambda w_D: w_D.unsqueeze(0)),)
    ),
}
# Graphs that add a bias to the scores before they choose experts.
BALANCED: Names = DECODER | {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}
_SECOND_NORM: Names = {"norm_2": "post_attention_norm"}
GLM: Names = BALANCED | _SECOND_NORM
GPT_OSS: Names = DECODER | _SECOND_NORM
GPT2: Names = DECODER | {"transformer.wpe": "position_embd", "attn.qkv": "attn_qkv", "mlp.fc": "ffn_up"}
