"""Which tensors a model has in a GGUF file: rules by graph of llama.cpp.

Experts are stacked as `(E, F, D)`, gate and up apart. Graphs that rotate neighbours instead of halves of a head want
query and key rows in that order.

Shape legend: E experts, F their hidden width, D model width, H heads, d what a head gets of the latent width R.
"""

from collections.abc import Callable

import torch

from litgpt_moe_ext.config.features import is_dense_layer
from litgpt_moe_ext.export.hf.facts import Facts
from litgpt_moe_ext.export.hf.names import Entries, with_interleaved_rotation
from litgpt_moe_ext.export.hf.tensors import Constant, Layout, Rule, interleaved

# One gate for the shared experts is a vector there.
_VECTOR = Layout(lambda w_1D: w_1D.squeeze(0), lambda w_D: w_D.unsqueeze(0))


def neighbours(entries: Callable[[Facts], Entries]) -> Callable[[Facts], Entries]:
    """Return the rules for a graph that rotates neighbours."""
    return lambda facts: with_interleaved_rotation(facts, entries(facts))


def decoder(facts: Facts, second_norm: str = "ffn_norm") -> Entries:
    """Return the rules of Llama and its relatives.

    Args:
        facts: The model's.
        second_norm: What the graph calls the norm before the feed-forward layer.
    """
    config = facts.config
    entries = [*_both("transformer.wte", "token_embd"), *_both("transformer.ln_f", "output_norm")]
    entries += _both("lm_head", "output")
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"blk.{i}."
        entries += _both(f"{ours}norm_1", f"{theirs}attn_norm") + _both(f"{ours}norm_2", theirs + second_norm)
        entries += (_latent_attention if facts.attention == "latent" else _attention)(facts, f"{ours}attn.", theirs)
        if facts.moe and not is_dense_layer(config, i):
            entries += _experts(facts, f"{ours}mlp.", theirs)
        else:
            entries += _gated(f"{ours}mlp.", theirs, "", facts.mlp_bias)
    return entries


def _attention(facts: Facts, ours: str, theirs: str) -> Entries:
    config = facts.config
    sizes = tuple(n * config.head_size for n in (config.n_head, config.n_query_groups, config.n_query_groups))
    entries = _parts(f"{ours}qkv", [f"{theirs}attn_{p}" for p in "qkv"], facts.attention_bias != "none", sizes)
    entries += _both(f"{ours}proj", f"{theirs}attn_output", facts.attention_bias == "all")
    if facts.qk_norm != "none":
        entries += _both(f"{ours}norm_q", f"{theirs}attn_q_norm") + _both(f"{ours}norm_k", f"{theirs}attn_k_norm")
    return entries


def _latent_attention(facts: Facts, ours: str, theirs: str) -> Entries:
    sizes = facts.latent_sizes
    fixed, rotated, n_value = (sizes[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query, key = f"{theirs}attn_q_b.weight", f"{theirs}attn_kv_a_mqa.weight"
    layouts = {}
    if facts.rope_layout == "half":
        layouts[query] = interleaved(fixed + rotated, rotated)
        layouts[key] = interleaved(sizes["kv_lora_rank"] + rotated, rotated)
    # The graph multiplies queries by the part for keys, so that it attends to what was not expanded.
    keys, values = f"{theirs}attn_k_b.weight", f"{theirs}attn_v_b.weight"
    expanded = Rule(
        f"{ours}kv_b_proj.weight",
        (keys, values),
        (fixed, n_value),
        {keys: Layout(lambda w_HdR: w_HdR.mT, lambda w_HRd: w_HRd.mT)},
        dim=1,
        whole=Layout(lambda w: w.unflatten(0, (-1, fixed + n_value)), lambda w_HdR: w_HdR.flatten(0, 1)),
    )
    return [
        *_both(f"{ours}q_a_proj", f"{theirs}attn_q_a"),
        *_both(f"{ours}q_a_norm", f"{theirs}attn_q_a_norm"),
        Rule(f"{ours}q_b_proj.weight", (query,), layouts=layouts),
        Rule(f"{ours}kv_a_proj_with_mqa.weight", (key,), layouts=layouts),
        *_both(f"{ours}kv_a_norm", f"{theirs}attn_kv_a_norm"),
        expanded,
        *_both(f"{ours}proj", f"{theirs}attn_output"),
    ]


def gpt_oss(facts: Facts) -> Entries:
    """Return the rules of GPT-OSS: sinks, and biases of the router and the experts."""
    config = facts.config
    entries = decoder(facts, "post_attention_norm")
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"blk.{i}."
        entries.append(Rule(f"{ours}attn.sinks", (f"{theirs}attn_sinks.weight",)))
        parts = (f"{theirs}ffn_gate_exps.bias", f"{theirs}ffn_up_exps.bias")
        entries.append(Rule(f"{ours}mlp.experts.gate_up_bias", parts, dim=1))
        entries.append(Rule(f"{ours}mlp.experts.down_bias", (f"{theirs}ffn_down_exps.bias",)))
        if facts.router_bias:
            entries.append(Rule(f"{ours}mlp.gate.bias", (f"{theirs}ffn_gate_inp.bias",)))
        else:
            size = config.n_expert
            entries.append(Constant(f"{theirs}ffn_gate_inp.bias", lambda size=size: torch.zeros(size)))
    return entries


def with_balancing_bias(entries: Callable[[Facts], Entries]) -> Callable[[Facts], Entries]:
    """Return the rules for a graph that adds a bias to the scores before it chooses."""

    def extended(facts: Facts) -> Entries:
        layers = [i for i in range(facts.config.n_layer) if not is_dense_layer(facts.config, i)]
        name = "mlp.gate.e_score_correction_bias"
        biases = [Rule(f"transformer.h.{i}.{name}", (f"blk.{i}.exp_probs_b.bias",)) for i in layers]
        return entries(facts) + biases

    return extended


def gpt2(facts: Facts) -> Entries:
    """Return the rules of GPT-2, which has biases everywhere; zeros where ours has none."""
    config = facts.config
    D, F = config.n_embd, config.intermediate_size
    entries = [*_both("transformer.wte", "token_embd"), *_both("transformer.wpe", "position_embd")]
    entries += [*_both("transformer.ln_f", "output_norm", bias=True), *_both("lm_head", "output")]
    maps = {"attn.qkv": ("attn_qkv", 3 * D), "attn.proj": ("attn_output", D), "mlp.fc": ("ffn_up", F)}
    maps["mlp.proj"] = ("ffn_down", D)
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"blk.{i}."
        entries += _both(f"{ours}norm_1", f"{theirs}attn_norm", bias=True)
        entries += _both(f"{ours}norm_2", f"{theirs}ffn_norm", bias=True)
        for our_map, (their_map, size) in maps.items():
            entries += _both(ours + our_map, theirs + their_map, facts.mlp_bias)
            if not facts.mlp_bias:
                entries.append(Constant(f"{theirs}{their_map}.bias", lambda size=size: torch.zeros(size)))
    return entries


def _experts(facts: Facts, ours: str, theirs: str) -> Entries:
    entries: Entries = [Rule(f"{ours}gate.weight", (f"{theirs}ffn_gate_inp.weight",))]
    parts = (f"{theirs}ffn_gate_exps.weight", f"{theirs}ffn_up_exps.weight")
    entries.append(Rule(f"{ours}experts.gate_up_proj", parts, dim=1))
    entries.append(Rule(f"{ours}experts.down_proj", (f"{theirs}ffn_down_exps.weight",)))
    if facts.shared != "none":
        entries += _gated(f"{ours}shared_experts.", theirs, "_shexp", bias=False)
    if facts.shared == "gated":
        name = f"{theirs}ffn_gate_inp_shexp.weight"
        entries.append(Rule(f"{ours}shared_expert_gate.weight", (name,), layouts={name: _VECTOR}))
    return entries


def _gated(ours: str, theirs: str, kind: str, bias: bool) -> Entries:
    maps = {"fc_1": "ffn_gate", "fc_2": "ffn_up", "proj": "ffn_down"}
    return [entry for a, b in maps.items() for entry in _both(ours + a, f"{theirs}{b}{kind}", bias)]


def _both(ours: str, theirs: str, bias: bool = False) -> Entries:
    return _parts(ours, [theirs], bias)


def _parts(ours: str, theirs: list[str], bias: bool, sizes: tuple[int, ...] | None = None) -> Entries:
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), sizes) for kind in kinds]
