"""The expert analysis as a self-contained HTML page, as pictures, and as JSON."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from litgpt_moe_ext.inspect import figures
from litgpt_moe_ext.inspect.experts.analysis import LEAST_EXPECTED
from litgpt_moe_ext.inspect.pages import page, picture, table, words
from litgpt_moe_ext.wording import counted


def make_figures(analysis: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the pictures of an analysis by name."""
    layers = analysis["layers"]
    made = {
        "load": figures.load_figure(layers),
        "balance": figures.balance_figure(layers),
        "classes": figures.class_figure(layers),
    }
    if layers[0]["top_k"] > 1:
        made["coactivation"] = figures.coactivation_figure(layers)
    if comparison := analysis.get("comparison"):
        names = Path(analysis["checkpoint"]).name, Path(comparison["checkpoint"]).name
        if names[0] == names[1]:
            names = "A", "B"
        made["agreement"] = figures.agreement_figure(comparison["layers"], names)
    return made


_CAPTIONS = {
    "load": (
        "Load and gate mass",
        "Tokens per expert, and sum of gate values per expert, over what an even spread would"
        " give. 1 is even, 0 is a dead expert.",
    ),
    "balance": (
        "Balance by layer",
        "MaxVio is the largest load over the mean, minus 1. The router's entropy is that of"
        " its scores over all experts, mean of all tokens. The last panel is the mutual information of a token's"
        " class and its expert, over the entropy of the class: 0 if the class says nothing, 1 if experts are"
        " specialists for classes.",
    ),
    "classes": (
        "Experts by class of token",
        "How much likelier an expert is for tokens of a class than for any token. Grey: fewer than"
        f" {LEAST_EXPECTED} visits expected, too few to tell.",
    ),
    "coactivation": (
        "Pairs of experts",
        "How often a token visits both experts, over what their loads alone would give. Grey: fewer than"
        f" {LEAST_EXPECTED} pairs expected, too few to tell.",
    ),
    "agreement": (
        "Agreement of two checkpoints",
        "The share of a token's experts that both checkpoints choose. Experts"
        " have no order, so those of the second are renumbered to agree best (matched); chance is what two"
        " routers with these loads would agree if they knew nothing of each other. On the right: where tokens"
        " of an expert of the first go in the second, in the matched order.",
    ),
}


def make_page(analysis: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    """Return the report as one HTML page without external resources; its pictures are PNGs by name."""
    parts = [_introduction(analysis), _summary_table(analysis["layers"])]
    parts += [picture(*_CAPTIONS[name], image) for name, image in images.items()]
    parts.append(_tokens_section(analysis["layers"]))
    return page(f"Experts of {analysis['checkpoint']}", parts)


def _introduction(analysis: Mapping[str, Any]) -> str:
    layer = analysis["layers"][0]
    classes = ", ".join(f"{name} {count:,}" for name, count in analysis["classes"].items())
    warning = analysis["warning"]
    compared = f" Compared with {analysis['comparison']['checkpoint']}." if analysis.get("comparison") else ""
    return (
        f"<p>{html.escape(analysis['mlp_class_name'])}, {layer['n_expert']} experts of which a token visits "
        f"{layer['top_k']}, in {counted(len(analysis['layers']), 'layer')}. Read: "
        f"{counted(analysis['tokens'], 'token')} of {words(analysis['source'])}, as {analysis['language']} "
        f"({html.escape(classes)})."
        f"{words(compared)}</p>" + (f"<p><b>{html.escape(warning)}.</b></p>" if warning else "")
    )


def _summary_table(layers: Sequence[Mapping[str, Any]]) -> str:
    columns = ("layer", "MaxVio", "dead experts", "busiest expert", "idlest expert", "router entropy (nats)")
    rows = []
    for layer in layers:
        load = layer["load_over_mean"]
        entropy = layer["router_entropy"]
        rows.append(
            (
                str(layer["layer"]),
                f"{layer['max_vio']:.2f}",
                str(layer["dead_experts"]),
                f"{load.index(max(load))} ({max(load):.2f})",
                f"{load.index(min(load))} ({min(load):.2f})",
                "none" if entropy is None else f"{entropy:.2f} of {layer['router_entropy_of_even']:.2f}",
            )
        )
    return table(columns, rows)


def _tokens_section(layers: Sequence[Mapping[str, Any]]) -> str:
    parts = [
        "<h2>Most specific tokens</h2><p>For each expert the tokens that visit it more often than others do, the surest"
        " first (log-likelihood ratio, Dunning 1993). The tooltip says how many of the token's occurrences visit.</p>"
    ]
    for layer in layers:
        rows = "".join(
            f"<tr><td>{e}</td><td>{layer['load_over_mean'][e]:.2f}</td>"
            f'<td class="tokens">{"".join(_token(token) for token in tokens)}</td></tr>'
            for e, tokens in enumerate(layer["specific_tokens"])
        )
        parts.append(
            f'<h3>Layer {layer["layer"]}</h3><div class="scroll"><table><tr><th>expert</th><th>load</th>'
            f'<th style="text-align:left">tokens</th></tr>{rows}</table></div>'
        )
    return "".join(parts)


def _token(token: Mapping[str, Any]) -> str:
    visible = token["text"].replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    occurrences = counted(round(token["count"] / token["share"]), "occurrence")
    return f'<code title="{token["count"]:,} of {occurrences} ({token["share"]:.0%})">{html.escape(visible)}</code>'
