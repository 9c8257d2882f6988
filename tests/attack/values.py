"""Values that stand in recipes by mistake, and fields to write them into."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Iterator
from typing import Any

from litgpt_moe_ext.training.settings import Section, Settings

VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 3, 0.5, -0.5, 2**31, 2**63, -(2**63) - 1, 1e30, 1e-320),
    *(math.inf, -math.inf, math.nan),
    *(None, True, False, "", "text", "1e4", "a\0b", b"bytes"),
    *([], [1], [None], ["a"], [[1]], {}, {"a": 1}, {1: 2}),
)

NEGATIVE = {"devices", "eval.evaluate_example", "model_config.attention_sink_init", "data.seed"}
"""Settings where a number below 0 means something: all devices, a place from the end, the logarithm of a weight."""

ZERO = NEGATIVE | {
    *("seed", "train.lr_warmup_steps", "train.min_lr", "sample.temperature", "ema.decay"),
    *("parameter_groups.router_lr_factor", "data.seed", "data.val_fraction"),
    *("optimizer.lr", "optimizer.eps", "optimizer.weight_decay"),
}
"""Settings where 0 means something; of a model all whose docs say so."""


def sections(cls: type[Section] = Settings) -> Iterator[type[Section]]:
    """Yield a section and all sections in it."""
    yield cls
    for field in dataclasses.fields(cls):
        if inspect.isclass(field.type) and issubclass(field.type, Section):
            yield from sections(field.type)


def sensible(name: str, value: Any) -> bool:
    """Return whether a number that a setting has accepted is one that it may accept."""
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float)):
        return True
    zero = name in ZERO or name.startswith("model_config.")
    countable = isinstance(value, float) or value <= 2**63
    return math.isfinite(value) and countable and (value > 0 or (value == 0 and zero) or name in NEGATIVE)


def fresh(value: Any) -> Any:
    """Return a copy: parsers change what they are given."""
    return copy.deepcopy(value)
