"""Which tensors a model has there: rules by architecture."""

from collections.abc import Iterable

import torch
from torch import Tensor

from litgpt_moe_ext.config.features import is_dense_layer
from litgpt_moe_ext.export.hf.config_json import is_gated
from litgpt_moe_ext.export.hf.facts import Facts
from litgpt_moe_ext.export.hf.tensors import AS_IT_IS, TRANSPOSED, Constant, Layout, Rule, interleaved

Entries = list[Rule | Constant]


def llama_like(facts: Facts) -> Entries:
    """Return the rules of decoders with Llama's names, without feed-forward layers."""
    config = facts.config
    entries: Entries = _both("transformer.wte", ("model.embed_tokens",), bias=False)
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        entries += _norm(facts, ours + "norm_1", theirs + "input_layernorm")
        entries += _norm(facts, ours + "norm_2", theirs + "post_attention_layernorm")
        attention = _latent_attention if facts.attention == "latent" else _attention
        entries += attention(facts, ours + "attn.", theirs + "self_attn.")
    entries += _norm(facts, "transformer.ln_f", "model.norm")
    return entries + _both("lm_head", ("lm_head",), facts.head_bias)


def _attention(facts: Facts, ours: str, theirs: str) -> Entries:
    config = facts.config
    sizes = tuple(n * config.head_size for n in (config.n_head, config.n_query_groups, config.n_query_groups))
    parts = tuple(f"{theirs}{p}_proj" for p in "qkv")
    entries = _both(ours + "qkv", parts, facts.attention_bias != "none", sizes)
    entries += _both(ours + "proj", (theirs + "o_proj",), facts.attention_bias == "all")
    if facts.qk_norm != "none":
        entries += _norm(facts, ours + "norm_q", theirs + "q_norm") + _norm(facts, ours + "norm_k", theirs + "k_norm")
    return entries


def _latent_attention(_facts: Facts, ours: str, theirs: str) -> Entries:
    same = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    maps = dict.fromkeys(same) | {"q_a_norm": "q_a_layernorm", "kv_a_norm": "kv_a_layernorm", "proj": "o_proj"}
    return [entry for a, b in maps.items() for entry in _both(ours + a, (theirs + (b or a),), bias=False)]


def gated_mlps(
    facts: Facts, experts: str = "", router: str = "", bias: str = "", shared: str = "", parts: str = "gate up down"
) -> Entries:
    """Return the rules of SwiGLU layers, dense ones and those with experts.

    Args:
        facts: The model's.
        experts: Name of an expert in a layer, with `{e}` for its number.
        router: Name of the gate in a layer.
        bias: Name of the balancing bias in a layer; none: the class has none.
        shared: Name of the shared experts in a layer.
        parts: Names of an expert's gate, up and down projections without `_proj`; a `.` at the start drops the suffix.
    """
    config = facts.config
    entries: Entries = []
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.mlp.", f"model.layers.{i}."
        if not facts.moe or is_dense_layer(config, i):
            entries += _dense(ours, theirs + "mlp.", facts.mlp_bias)
            continue
        gate, up, down = (p[1:] if p.startswith(".") else f"{p}_proj" for p in parts.split())
        expert = theirs + experts
        entries.append(Rule(ours + "gate.weight", (f"{theirs}{router}.weight",)))
        if bias:
            entries.append(Rule(ours + "gate.e_score_correction_bias", (theirs + bias,)))
        entries.append(Rule(ours + "experts.gate_up_proj", (f"{expert}.{gate}.weight", f"{expert}.{up}.weight")))
        entries.append(Rule(ours + "experts.down_proj", (f"{expert}.{down}.weight",)))
        if facts.shared != "none":
            entries += _dense(ours + "shared_experts.", f"{theirs}{shared}.", facts.mlp_bias)
        if facts.shared == "gated":
            name = "shared_expert_gate.weight"
            entries.append(Rule(ours + name, (f"{theirs}mlp.{name}",)))
    return entries


def own(facts: Facts) -> Entries:
    """Return the rules of `modeling_litgpt_moe.py`: Llama's names, stacked experts."""
    config = facts.config
    entries = llama_like(facts)
    if facts.positions == "learned":
        entries += _both("transformer.wpe", ("model.embed_positions",), bias=False)
    gated = is_gated(facts)
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        entries.append(Rule(ours + "attn.sinks", (theirs + "self_attn.sinks",)))
        if not facts.moe or is_dense_layer(config, i):
            entries += _dense(ours + "mlp.", theirs + "mlp.", facts.mlp_bias, gated)
            continue
        first = "gate_up" if gated else "up"
        names = ["gate.weight", f"experts.{first}_proj", "experts.down_proj"]
        if facts.router == "topk":
            names.append("gate.e_score_correction_bias")
        if facts.router_bias:
            names.append("gate.bias")
        if facts.mlp_bias:
            names += [f"experts.{first}_bias", "experts.down_bias"]
        if facts.shared == "gated":
            names.append("shared_expert_gate.weight")
        entries += [Rule(f"{ours}mlp.{name}", (f"{theirs}mlp.{name}",)) for name in names]
        if facts.shared != "none":
            entries += _dense(ours + "mlp.shared_experts.", theirs + "mlp.shared_experts.", facts.mlp_bias, gated)
    return _with_sinks_only_where_there_are(facts, entries)


def gpt_oss(facts: Facts) -> Entries:
    """Return the rules of `GptOssForCausalLM`: experts as (in, out), their gate and up rows in turns."""
    config = facts.config
    entries = llama_like(facts)
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}.", f"model.layers.{i}."
        maps = {
            "experts.gate_up_proj": ("gate_up_proj", Layout(_in_turns_transposed, _one_after_the_other_transposed)),
            "experts.gate_up_bias": ("gate_up_proj_bias", Layout(_in_turns, _one_after_the_other)),
            "experts.down_proj": ("down_proj", Layout(lambda w: w.mT, lambda w: w.mT)),
            "experts.down_bias": ("down_proj_bias", AS_IT_IS),
        }
        entries.append(Rule(f"{ours}attn.sinks", (f"{theirs}self_attn.sinks",)))
        entries.append(Rule(f"{ours}mlp.gate.weight", (f"{theirs}mlp.router.weight",)))
        if facts.router_bias:
            entries.append(Rule(f"{ours}mlp.gate.bias", (f"{theirs}mlp.router.bias",)))
        else:
            size = config.n_expert
            entries.append(Constant(f"{theirs}mlp.router.bias", lambda size=size: torch.zeros(size)))
        for name, (theirs_name, layout) in maps.items():
            place = f"{theirs}mlp.experts.{theirs_name}"
            entries.append(Rule(f"{ours}mlp.{name}", (place,), layouts={place: layout}))
    return entries


def _in_turns(rows: Tensor) -> Tensor:
    # (E, 2F, ...): gate rows above up rows, to one of each in turns.
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _one_after_the_other(rows: Tensor) -> Tensor:
    return rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _in_turns_transposed(rows: Tensor) -> Tensor:
    return _in_turns(rows).mT


def _one_after_the_other_transposed(columns: Tensor) -> Tensor:
    return _one_after_the_other(columns.mT)


def gpt2(facts: Facts) -> Entries:
    """Return the rules of `GPT2LMHeadModel`, which has biases everywhere; zeros where ours has none."""
    config = facts.config
    D, F = config.n_embd, config.intermediate_size
    entries = [
        *_both("transformer.wte", ("transformer.wte",), bias=False),
        *_both("transformer.wpe", ("transformer.wpe",), bias=False),
        *_norm(facts, "transformer.ln_f", "transformer.ln_f"),
        *_both("lm_head", ("lm_head",), bias=False),
    ]
    maps = {"attn.qkv": ("attn.c_attn", 3 * D), "attn.proj": ("attn.c_proj", D), "mlp.fc": ("mlp.c_fc", F)}
    maps["mlp.proj"] = ("mlp.c_proj", D)
    for i in range(config.n_layer):
        layer = f"transformer.h.{i}."
        entries += _norm(facts, layer + "norm_1", layer + "ln_1") + _norm(facts, layer + "norm_2", layer + "ln_2")
        for ours, (theirs, size) in maps.items():
            name = f"{layer}{theirs}.weight"
            entries.append(Rule(f"{layer}{ours}.weight", (name,), layouts={name: TRANSPOSED}))
            if facts.mlp_bias:
                entries.append(Rule(f"{layer}{ours}.bias", (f"{layer}{theirs}.bias",)))
            else:
                entries.append(Constant(f"{layer}{theirs}.bias", lambda size=size: torch.zeros(size)))
    return entries


def with_interleaved_rotation(facts: Facts, entries: Entries) -> Entries:
    """Return the rules with query and key rows in the order of a class that rotates neighbours."""
    layout = interleaved(facts.config.head_size)

    def changed(entry: Rule | Constant) -> Rule | Constant:
        if isinstance(entry, Constant) or ".attn.qkv." not in entry.ours:
            return entry
        layouts: dict[str, Layout] = dict.fromkeys(entry.theirs[:2], layout)
        return Rule(entry.ours, entry.theirs, entry.sizes, layouts)

    return [changed(entry) for entry in entries]


def _with_sinks_only_where_there_are(facts: Facts, entries: Entries) -> Entries:
    from litgpt_moe_ext.export.hf.facts import layer_has_sinks

    absent = {
        f"transformer.h.{i}.attn.sinks" for i in range(facts.config.n_layer) if not layer_has_sinks(facts.config, i)
    }
    return [entry for entry in entries if isinstance(entry, Constant) or entry.ours not in absent]


def _dense(ours: str, theirs: str, bias: bool, gated: bool = True) -> Entries:
    maps = {"fc_1": "gate_proj", "fc_2": "up_proj"} if gated else {"fc": "up_proj"}
    maps["proj"] = "down_proj"
    return [entry for a, b in maps.items() for entry in _both(ours + a, (theirs + b,), bias)]


def _norm(facts: Facts, ours: str, theirs: str) -> Entries:
    return _both(ours, (theirs,), facts.norm == "layer")


def _both(ours: str, theirs: Iterable[str], bias: bool, sizes: tuple[int, ...] | None = None) -> Entries:
    kinds = ("weight", "bias") if bias else ("weight",)
    return [Rule(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), sizes) for kind in kinds]
