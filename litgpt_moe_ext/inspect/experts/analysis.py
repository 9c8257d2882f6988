"""Statistics about the experts of a checkpoint on a text, as plain data for reports."""

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.experts import statistics
from litgpt_moe_ext.inspect.experts.capture import LayerRouting
from litgpt_moe_ext.inspect.experts.token_classes import PYTHON_CLASSES, TEXT_CLASSES, python_classes, text_classes
from litgpt_moe_ext.inspect.texts import EncodedDocument, processor_of
from litgpt_moe_ext.moe.balancing.metrics import load_entropy, max_violation
from litgpt_moe_ext.wording import counted, quoted

if TYPE_CHECKING:
    from litgpt import Tokenizer

LEAST_EXPECTED = 5
"""Least expected visits of a cell for its colour to be meaningful: the usual rule for counts in tables."""
ENOUGH_VISITS = 100
"""Visits per expert at which chance alone changes a load by at most a fifth in 19 of 20 cases."""


@dataclass(frozen=True)
class ClassifiedTokens:
    """The tokens of a text and what kind of thing each is part of.

    Attributes:
        ids_N: Token ids, int64.
        classes_N: Number of each token's class, int64.
        names: Names of all classes.
    """

    ids_N: Tensor
    classes_N: Tensor
    names: tuple[str, ...]


def classify(documents: Sequence[EncodedDocument], language: str) -> tuple[str, ClassifiedTokens]:
    """Return the language of the texts and the classes of their tokens.

    Args:
        documents: The texts.
        language: `python`, `text`, or `auto` for Python where most tokens are in files whose names end in `.py` or
            in texts that Python can read.
    """
    if language == "auto":
        python = sum(len(document.ids) for document in documents if _looks_like_python(document))
        language = "python" if 2 * python > sum(len(document.ids) for document in documents) else "text"
    names, classes_of = (PYTHON_CLASSES, python_classes) if language == "python" else (TEXT_CLASSES, text_classes)
    classes = [names.index(name) for document in documents for name in classes_of(document.text, document.spans)]
    ids = [token for document in documents for token in document.ids]
    return language, ClassifiedTokens(torch.tensor(ids), torch.tensor(classes), names)


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
    except (
        SyntaxError,
        ValueError,
        MemoryError,
        RecursionError,
    ):  # the last two: a long rule of dashes is nested signs
        return False
    return True


def analyse(layers: Sequence[LayerRouting], tokens: ClassifiedTokens, tokenizer: "Tokenizer") -> dict[str, Any]:
    """Return everything about the experts of one checkpoint.

    Args:
        layers: The routing of the text.
        tokens: Its tokens.
        tokenizer: Writes tokens as text.
    """
    counts_C = torch.bincount(tokens.classes_N, minlength=len(tokens.names)).tolist()
    return {
        "tokens": len(tokens.ids_N),
        "warning": _warning(len(tokens.ids_N), layers[0]),
        "classes": {name: count for name, count in zip(tokens.names, counts_C, strict=True) if count},
        "layers": [_analyse_layer(layer, tokens, tokenizer) for layer in layers],
    }


def _warning(n_token: int, layer: LayerRouting) -> str | None:
    visits = n_token * layer.experts_NK.size(1) / layer.n_expert
    if visits >= ENOUGH_VISITS:
        return None
    needed = math.ceil(ENOUGH_VISITS * layer.n_expert / layer.experts_NK.size(1))
    return (
        f"with {counted(n_token, 'token')} an expert has about {counted(round(visits), 'visit')}: differences of up to "
        f"{200 / math.sqrt(max(visits, 1)):.0f} % are chance; read at least {needed:,} tokens"
    )


def _analyse_layer(layer: LayerRouting, tokens: ClassifiedTokens, tokenizer: "Tokenizer") -> dict[str, Any]:
    E = layer.n_expert
    load_E = statistics.expert_load(layer.experts_NK, E)
    pairs_EE = statistics.coactivation(layer.experts_NK, E)
    counts_CE = statistics.class_counts(tokens.classes_N, layer.experts_NK, len(tokens.names), E)
    present_C = counts_CE.sum(dim=1) > 0
    names = [name for name, present in zip(tokens.names, present_C.tolist(), strict=True) if present]
    counts_CE = counts_CE[present_C]
    lift_CE = statistics.lift(counts_CE, least=LEAST_EXPECTED)
    specific = statistics.specific_tokens(tokens.ids_N, layer.experts_NK, E, best=8)
    entropy = None if layer.entropy_N is None else layer.entropy_N.double().mean().item()
    return {
        "layer": layer.layer,
        "n_expert": E,
        "top_k": layer.experts_NK.size(1),
        "load": load_E.tolist(),
        "load_over_mean": (load_E / load_E.double().mean()).tolist(),
        "gate_mass": statistics.gate_mass(layer.weights_NK, layer.experts_NK, E).tolist(),
        "max_vio": max_violation(load_E.double()).item(),
        "load_entropy": load_entropy(load_E.double()).item(),
        "dead_experts": int((load_E == 0).sum()),
        "router_entropy": entropy,
        "router_entropy_of_even": math.log(E),
        "coactivation": pairs_EE.tolist(),
        "coactivation_lift": _plain(statistics.coactivation_lift(pairs_EE, least=LEAST_EXPECTED)),
        "class_counts": dict(zip(names, counts_CE.tolist(), strict=True)),
        "class_lift": dict(zip(names, _plain(lift_CE), strict=True)),
        "class_information": _plain(torch.tensor(statistics.normalized_information(counts_CE))),
        "specific_tokens": [
            [{**token._asdict(), "text": tokenizer.processor.decode([token.id])} for token in found]
            for found in specific
        ],
    }


def compare(first: Sequence[LayerRouting], second: Sequence[LayerRouting]) -> list[dict[str, Any]]:
    """Return the agreement of two checkpoints' routing of the same tokens, layer by layer.

    Raises:
        SettingsError: If they differ in their MoE layers.
    """
    shapes = [[(layer.layer, layer.n_expert, layer.experts_NK.size(1)) for layer in side] for side in (first, second)]
    if shapes[0] != shapes[1]:
        raise SettingsError(
            f"compare_with: its MoE layers (number, experts, top-k) must be {shapes[0]} as in checkpoint_dir, not "
            f"{shapes[1]}; compare checkpoints of one architecture"
        )
    results = []
    for a, b in zip(first, second, strict=True):
        found = statistics.agreement(a.experts_NK, b.experts_NK, a.n_expert)
        results.append({"layer": a.layer, **found._asdict(), "overlap_EE": found.overlap_EE.tolist()})
    return results


def require_same_tokenizer(directories: Sequence[Path], tokenizers: "Sequence[Tokenizer]") -> None:
    """Raise SettingsError unless all checkpoints tokenize text alike."""
    first, second = directories[0], directories[-1]
    if processor_of(tokenizers[0]).to_str() != processor_of(tokenizers[-1]).to_str():
        raise SettingsError(
            f"compare_with: {quoted(second)} must have the tokenizer of {quoted(first)}; tokens of two tokenizers "
            "cannot be compared"
        )


def _plain(values: Tensor) -> Any:
    # JSON has no nan.
    if values.dim() == 0:
        return None if values.isnan() else values.item()
    return [_plain(value) for value in values]
