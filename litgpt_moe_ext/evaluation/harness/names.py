"""The metrics, aggregations and filters that a task file names, of which lm-eval drops unknown ones or fails late."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import lm_eval.filters  # noqa: F401  (registers the filters)
from lm_eval.api.registry import AGGREGATION_REGISTRY, FILTER_REGISTRY, METRIC_REGISTRY, get_metric

from litgpt_moe_ext.errors import did_you_mean, refuse_first

REPORTED = {
    "loglikelihood": ("acc", "perplexity"),
    "loglikelihood_rolling": ("bits_per_byte", "byte_perplexity", "word_perplexity"),
    "multiple_choice": ("acc", "acc_mutual_info", "acc_norm", "brier_score", "exact_match", "f1", "mcc"),
    "generate_until": ("bleu", "chrf", "exact_match", "ter"),
}
"""Metrics of each output type. lm-eval reports no other, but for generated text those of Hugging Face's `evaluate`."""


def check_names(config: dict[str, Any], path: Path) -> None:
    """Raise SettingsError if a task names what lm-eval does not know, or does not report for its type of output.

    Args:
        config: The task.
        path: Its file, for the message.
    """
    refuse_first(f"tasks: {path}: {message}" for message in _unknown(config))


def _unknown(config: dict[str, Any]) -> Iterator[str]:
    kind = config.get("output_type", "generate_until")
    for entry in _mappings(config.get("metric_list")):
        metric, aggregation = entry.get("metric"), entry.get("aggregation")
        # A function of the task's own may report what it likes.
        if isinstance(metric, str) and kind in REPORTED and "process_results" not in config:
            found = metric in REPORTED[kind] or (kind == "generate_until" and _of_evaluate(metric, entry))
            if not found:
                yield f"metric: {metric!r} is not reported for output_type: {kind}{_one_of(metric, REPORTED[kind])}"
        if isinstance(aggregation, str) and aggregation not in AGGREGATION_REGISTRY:
            yield f"aggregation: {aggregation!r} is unknown to lm-eval{_one_of(aggregation, AGGREGATION_REGISTRY)}"
    for steps in _mappings(config.get("filter_list")):
        for step in _mappings(steps.get("filter")):
            name = step.get("function")
            if isinstance(name, str) and name not in FILTER_REGISTRY:
                yield f"filter: {name!r} is unknown to lm-eval{_one_of(name, FILTER_REGISTRY)}"


def _of_evaluate(metric: str, entry: dict[str, Any]) -> bool:
    """Return whether Hugging Face's `evaluate` has a metric, and lm-eval takes it from there."""
    wanted = entry.get("hf_evaluate") is True
    return (wanted or metric not in METRIC_REGISTRY) and get_metric(metric, wanted) is not None


def _mappings(value: Any) -> list[dict[str, Any]]:
    # lm-eval itself refuses anything else.
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _one_of(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, known) or f"; choose from {', '.join(sorted(known))}"
