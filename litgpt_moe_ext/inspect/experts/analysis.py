"""From a checkpoint and a text to figures about its experts, as plain data for reports."""

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.inspect.experts import statistics
from litgpt_moe_ext.inspect.experts.capture import LayerRouting
from litgpt_moe_ext.inspect.experts.token_classes import PYTHON_CLASSES, TEXT_CLASSES, python_classes, text_classes
from litgpt_moe_ext.inspect.texts import EncodedDocument
from litgpt_moe_ext.moe.metrics import load_entropy, max_over_mean

LANGUAGES = ("auto", "python", "text")


def classify(documents: Sequence[EncodedDocument], language: str) -> tuple[str, Tensor, tuple[str, ...]]:
    """Return the language used, the class number of every token, and the names of the classes.

    Args:
        documents: The texts.
        language: `python`, `text`, or `auto` for Python where most tokens are in files whose names end in `.py` or
            in texts that Python can read.
    """
    if language == "auto":
        python = sum(len(document.ids) for document in documents if _looks_like_python(document))
        language = "python" if 2 * python > sum(len(document.ids) for document in documents) else "text"
    names, classes_of = (PYTHON_CLASSES, python_classes) if language == "python" else (TEXT_CLASSES, text_classes)
    found = [names.index(name) for document in documents for name in classes_of(document.text, document.spans)]
    return language, torch.tensor(found), names


def _looks_like_python(document: EncodedDocument) -> bool:
    if document.name.endswith(".py"):
        return True
    # Python can read a whole file, or one that was cut off up to where its last definition starts.
    lines = document.text.splitlines(keepends=True)
    last = max((i for i, line in enumerate(lines) if line[:1].isalpha()), default=0)
    return any(_parses(text) for text in (document.text, "".join(lines[:last])) if text.strip())


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def analyse(
    layers: Sequence[LayerRouting], ids_N: Tensor, classes_N: Tensor, class_names: Sequence[str], tokenizer: Any
) -> dict[str, Any]:
    """Return everything about the experts of one checkpoint.

    Args:
        layers: The routing of the text.
        ids_N: Its tokens.
        classes_N: Their classes, by number.
        class_names: Names of the classes.
        tokenizer: The `litgpt.Tokenizer`, to write tokens as text.
    """
    present = [c for c in range(len(class_names)) if (classes_N == c).any()]
    return {
        "tokens": len(ids_N),
        "classes": {class_names[c]: int((classes_N == c).sum()) for c in present},
        "layers": [_analyse_layer(layer, ids_N, classes_N, class_names, present, tokenizer) for layer in layers],
    }


def _analyse_layer(
    layer: LayerRouting,
    ids_N: Tensor,
    classes_N: Tensor,
    class_names: Sequence[str],
    present: Sequence[int],
    tokenizer: Any,
) -> dict[str, Any]:
    E = layer.n_expert
    load_E = statistics.expert_load(layer.experts_NK, E)
    pairs_EE = statistics.coactivation(layer.experts_NK, E)
    counts_CE = statistics.class_counts(classes_N, layer.experts_NK, len(class_names), E)[list(present)]
    specific = statistics.specific_tokens(ids_N, layer.experts_NK, E, best=8)
    entropy = None if layer.entropy_N is None else layer.entropy_N.double().mean().item()
    return {
        "layer": layer.layer,
        "n_expert": E,
        "top_k": layer.experts_NK.size(1),
        "load": load_E.tolist(),
        "load_over_mean": (load_E / load_E.double().mean()).tolist(),
        "gate_mass": statistics.gate_mass(layer.weights_NK, layer.experts_NK, E).tolist(),
        "max_vio": max_over_mean(load_E.double()).item() - 1,
        "load_entropy": load_entropy(load_E.double()).item(),
        "dead_experts": int((load_E == 0).sum()),
        "router_entropy": entropy,
        "router_entropy_of_even": math.log(E),
        "coactivation": pairs_EE.tolist(),
        "coactivation_lift": _plain(statistics.coactivation_lift(pairs_EE)),
        "class_counts": {class_names[c]: row for c, row in zip(present, counts_CE.tolist(), strict=True)},
        "class_lift": {class_names[c]: row for c, row in zip(present, _plain(statistics.lift(counts_CE)), strict=True)},
        "class_information": _plain(torch.tensor(statistics.normalized_information(counts_CE))),
        "specific_tokens": [
            [{**token._asdict(), "text": tokenizer.processor.decode([token.id])} for token in tokens]
            for tokens in specific
        ],
    }


def compare(first: Sequence[LayerRouting], second: Sequence[LayerRouting]) -> list[dict[str, Any]]:
    """Return how far two checkpoints route the same tokens alike, layer by layer.

    Raises:
        ValueError: If they differ in their MoE layers.
    """
    shapes = [[(layer.layer, layer.n_expert, layer.experts_NK.size(1)) for layer in side] for side in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"compare_with: the checkpoints have different MoE layers (number, experts, top-k): {shapes[0]} and "
            f"{shapes[1]}; compare checkpoints of the same architecture"
        )
    results = []
    for a, b in zip(first, second, strict=True):
        found = statistics.agreement(a.experts_NK, b.experts_NK, a.n_expert)
        results.append({"layer": a.layer, **found._asdict(), "overlap_EE": found.overlap_EE.tolist()})
    return results


def require_same_tokenizer(first: Path, second: Path, tokenizers: tuple[Any, Any]) -> None:
    """Raise ValueError unless both checkpoints read text as the same tokens."""
    if tokenizers[0].processor.to_str() != tokenizers[1].processor.to_str():
        raise ValueError(
            f"compare_with: {str(second)!r} has another tokenizer than {str(first)!r}, so that their tokens cannot be "
            "compared"
        )


def _plain(values: Tensor) -> Any:
    # JSON has no nan.
    if values.dim() == 0:
        return None if values.isnan() else values.item()
    return [_plain(value) for value in values]
