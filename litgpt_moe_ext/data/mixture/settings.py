"""Settings of a mixture: its weights, the start of its annealing, the length of the run."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import NonNegativeInt, Share, check_fields


class RunLength(NamedTuple):
    """The length of a run.

    Attributes:
        steps: Optimizer steps of the whole training.
        rows_per_step: Sequences of a step, over all ranks.
        validation_batches: Maximum batches of a validation on each rank.
        scheduled_steps: Steps of the learning rate schedule, before whose end `train.max_steps` may end the run; None:
            as many.
    """

    steps: int
    rows_per_step: int
    validation_batches: int
    scheduled_steps: int | None = None


@dataclass(frozen=True)
class Annealing:
    """Other shares towards the end of a training. Exactly one of the three starting points is set.

    Attributes:
        weights: Share of each corpus from then on; every corpus is named.
        from_step: Number of optimizer steps after which they apply.
        from_fraction: Instead, the fraction of the steps of `train.max_tokens` after which they apply, such as 0.9.
        from_tokens: Instead, the number of tokens after which they apply, rounded up to a step.
    """

    weights: dict[str, float]
    from_step: NonNegativeInt | None = None
    from_fraction: Share | None = None
    from_tokens: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_fields(self, "data.annealing.")

    def check_start(self) -> None:
        """Raise SettingsError unless exactly one starting point is set."""
        names = ("from_step", "from_fraction", "from_tokens")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) != 1:
            raise SettingsError(
                f"data.annealing: {', '.join(given) or 'no beginning'} must be exactly one of {', '.join(names)}; keep "
                "one"
            )

    def first_row(self, length: RunLength | None, row_tokens: int) -> int:
        """Return the first row of the annealing.

        Args:
            length: The length of the run, or None if unknown.
            row_tokens: Tokens of a row.

        Raises:
            SettingsError: It depends on the length of the run, which is unknown.
        """
        if self.from_tokens is not None:
            rows = -(-self.from_tokens // row_tokens)
            return rows if length is None else -(-rows // length.rows_per_step) * length.rows_per_step
        if length is None:
            name, value = next(
                (name, getattr(self, name))
                for name in ("from_step", "from_fraction")
                if getattr(self, name) is not None
            )
            raise SettingsError(
                f"data.annealing.{name}: {value} needs the length of the run, which this command does not tell; train "
                "with `litgpt-moe train`, or set from_tokens instead"
            )
        if self.from_step is not None:
            return self.from_step * length.rows_per_step
        assert self.from_fraction is not None
        # A run that `train.max_steps` ends early is the beginning of a longer one.
        steps = length.steps if length.scheduled_steps is None else length.scheduled_steps
        return round(self.from_fraction * steps) * length.rows_per_step


def check_weights(setting: str, weights: Mapping[str, float], names: Collection[str]) -> None:
    """Raise SettingsError unless exactly the given corpora have weights, all of them valid.

    Args:
        setting: Name of the setting.
        weights: Weights by corpus.
        names: Names of the corpora.
    """
    for name in weights:
        if name not in names:
            raise SettingsError(
                f"{setting}.{name}: must be one of data.corpora, {', '.join(names)}; rename or remove it"
            )
    for name in names:
        if name not in weights:
            raise SettingsError(f"{setting}: {dict(weights)} must have a weight for {name} of data.corpora; add it")
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise SettingsError(
                f"{setting}.{name}: {weights[name]} must be a number of at least 0; set the corpus' share of the tokens"
            )
    if not any(weights.values()):
        raise SettingsError(f"{setting}: {dict(weights)} must not all be 0; set the corpora's shares of the tokens")
