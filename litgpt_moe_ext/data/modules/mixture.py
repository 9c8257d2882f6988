"""Several corpora in fixed shares as one data module."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer

from litgpt_moe_ext.data.corpora.documents import EncodedCorpus
from litgpt_moe_ext.data.corpora.prepared import PreparedCorpus
from litgpt_moe_ext.data.loader import Order, TokenLoader
from litgpt_moe_ext.data.mixture.loader import MixedWindows, MixtureLoader, MixtureValidation, Part
from litgpt_moe_ext.data.mixture.schedule import Phases, Schedule, whole_shares
from litgpt_moe_ext.data.mixture.settings import Annealing, RunLength, check_weights
from litgpt_moe_ext.data.modules.base import ShardModule, TokenModule, is_first_rank, naming
from litgpt_moe_ext.data.modules.shared_tokenizer import SharedTokenizer
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import NonNegativeInt, PositiveFloat, check_fields


@dataclass
class Mixture(TokenModule):
    """Several corpora, each with a fixed share of the tokens, and optionally other shares towards the end.

    Rows are dealt out, not drawn: after any number of rows, each corpus has had its share to within one row. A corpus
    that is used up starts over in a new order, independently of the others. All corpora share one tokenizer, that of
    the first corpus that has one, which corpora use if their settings name none. Validation covers each corpus; the
    loss of the mixture is the mean of the corpora's losses with the training's weights.

    An entry point that knows the length of the run calls `plan_run` before `setup`.
    """

    corpora: dict[str, DataModule]
    """Corpora by name, each a data module of litgpt_moe_ext.data with its own class_path and init_args."""
    weights: dict[str, float]
    """Each corpus' share of the tokens, in any unit: 7 and 3 mean the same as 0.7 and 0.3. Zero for a corpus read only
    in the annealing."""
    annealing: Annealing | None = None
    """Other weights from a point on, given as from_step, from_fraction or from_tokens."""
    max_epochs: PositiveFloat | None = None
    """Refuse a run that would read a corpus more often than this. Default: no limit."""
    seed: NonNegativeInt = 42
    """Seed of the order of all windows. The corpora's own seeds decide which documents validate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "data.")
        self._length: RunLength | None = None
        self._shared = SharedTokenizer(self.corpora)
        _check_corpora(self.corpora)
        check_weights("data.weights", self.weights, self.corpora)
        later = None
        if self.annealing is not None:
            check_weights("data.annealing.weights", self.annealing.weights, self.corpora)
            self.annealing.check_start()
            later = self.annealing.weights
        for name, weight in self.weights.items():
            if weight == 0 and (later is None or later[name] == 0):
                raise SettingsError(
                    f"data.weights.{name}: 0 means that this corpus is never read; leave it out of data.corpora, or "
                    "give it a weight, here or in data.annealing.weights"
                )

    @property
    def parts(self) -> dict[str, ShardModule]:
        """The corpora."""
        return self.corpora  # pyrefly: ignore[bad-return] checked when they were given

    @property
    def pads(self) -> bool:
        """See `TokenModule.pads`."""
        return any(module.pads for module in self.parts.values())

    def require_vocabulary(self, padded_vocab_size: int) -> None:
        """See `TokenModule.require_vocabulary`."""
        for name, module in self.parts.items():
            with naming(name, module):
                module.require_vocabulary(padded_vocab_size)

    def require_documents(self, boundary: str, token_id: int) -> None:
        """See `TokenModule.require_documents`."""
        for name, module in self.parts.items():
            with naming(name, module):
                module.require_documents(boundary, token_id)

    def plan_run(self, length: RunLength) -> None:
        """Take over the length of the run.

        Raises:
            SettingsError: A validation is too short to cover every corpus.
        """
        self._length = length
        if length.validation_batches < len(self.corpora):
            raise SettingsError(
                f"eval.max_iters: {length.validation_batches} must be at least {len(self.corpora)}, one batch per "
                "corpus of the mixture"
            )

    @property
    def flags_to_go_on(self) -> str:
        """Flags, each after a space, that keep this run's shares in a longer run; empty if none is needed."""
        if self.annealing is None or self.annealing.from_fraction is None or self._length is None:
            return ""
        # The same fraction of a longer run would be another step.
        step = self.annealing.first_row(self._length, 1) // self._length.rows_per_step
        return f" --data.annealing.from_fraction null --data.annealing.from_step {step}"

    def check_sources(self) -> None:
        """Check that the files of the corpora exist, for corpora that have any, and that one tokenizer will do.

        Raises:
            SettingsError: See `EncodedCorpus.check_sources` and `SharedTokenizer.look_ahead`.
        """
        for name, module in self.parts.items():
            with naming(name, module):
                if isinstance(module, EncodedCorpus | PreparedCorpus):
                    module.check_sources()
        self._shared.look_ahead(self.tokenizer)

    def prepare_tokenizer(self) -> Path | None:
        """Prepare all corpora if needed and return the tokenizer directory; None if no corpus has a tokenizer."""
        self.prepare_data()
        return self._shared.directory

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """See `TokenModule.connect`."""
        super().connect(tokenizer, batch_size, max_seq_length)
        for module in self.parts.values():
            module.connect(module.tokenizer, batch_size, max_seq_length)

    def prepare_data(self) -> None:
        """Prepare the corpora that are not prepared yet, one by one.

        Raises:
            SettingsError: They do not fit together, or one of them cannot be prepared.
        """
        self._shared.prepare(self.tokenizer)

    def setup(self, stage: str = "") -> None:
        """Open the token shards of every corpus.

        Raises:
            SettingsError: Two corpora are the same.
        """
        self.prepare_data()
        names: dict[str, str] = {}
        for name, module in self.parts.items():
            with naming(name, module):
                module.setup(stage)
            if (other := names.setdefault(module.corpus_id, name)) != name:
                raise SettingsError(
                    f"data.corpora.{name}: is the same corpus as {other}; leave one of them out and give the other "
                    "both weights"
                )

    def train_dataloader(self) -> MixtureLoader:
        """Return the resumable training loader.

        Raises:
            SettingsError: A corpus would be read more often than `max_epochs`, or the start of the annealing depends on
                the length of the run, which is unknown.
        """
        parts = [
            Part(
                name,
                module.windows_of("training", f"training data of {name}"),
                Order(self.seed, module.shuffle, module.corpus_id),
            )
            for name, module in self.parts.items()
        ]
        phases = self._phases(parts)
        self._check_epochs(parts, phases)
        if is_first_rank():
            print(self._describe(parts, phases), flush=True)
        return MixtureLoader(MixedWindows(parts, phases, "training data of the mixture"), self.batch_size)

    def val_dataloader(self) -> MixtureValidation:
        """Return the validation loader: a batch of each corpus in turn, every window once."""
        loaders = {
            name: TokenLoader(module.windows_of("validation", f"validation data of {name}"), self.batch_size, False)
            for name, module in self.parts.items()
        }
        return MixtureValidation(loaders, self.weights)

    def _phases(self, parts: Sequence[Part]) -> Phases:
        first = Schedule(_row_shares(self.weights, parts))
        if self.annealing is None:
            return Phases(first)
        second = Schedule(_row_shares(self.annealing.weights, parts))
        return Phases(first, second, self.annealing.first_row(self._length, parts[0].windows.block_size))

    def _check_epochs(self, parts: Sequence[Part], phases: Phases) -> None:
        if self.max_epochs is None:
            return
        if self._length is None:
            raise SettingsError(
                f"data.max_epochs: {self.max_epochs:g} needs the length of the run, which this command does not tell; "
                "train with `litgpt-moe train`, or leave it out"
            )
        for part, epochs in zip(parts, _epochs(parts, phases, self._length), strict=True):
            if epochs > self.max_epochs:
                raise SettingsError(
                    f"data.max_epochs: {self.max_epochs:g} must be at least {math.ceil(100 * epochs) / 100:g}, as "
                    f"often as this run reads {part.name}; lower its weight, train on fewer tokens, or raise max_epochs"
                )

    def _describe(self, parts: Sequence[Part], phases: Phases) -> str:
        epochs = [None] * len(parts) if self._length is None else _epochs(parts, phases, self._length)
        sizes = (
            f"{part.name} {_percent(self.weights, part.name)} of {part.windows.targets:,} tokens"
            + ("" if times is None else f" ({times:.2f} epochs)")
            for part, times in zip(parts, epochs, strict=True)
        )
        text = f"Mixture: {', '.join(sizes)}"
        if self.annealing is None or phases.second is None:
            return text
        weights = self.annealing.weights
        later = ", ".join(f"{name} {_percent(weights, name)}" for name in weights)
        if self._length is None:
            return f"{text}; from sequence {phases.border} on {later}"
        if phases.border >= self._length.steps * self._length.rows_per_step:
            return f"{text}; the annealing would begin after the last step of this run ({self.annealing})"
        return f"{text}; after step {phases.border / self._length.rows_per_step:g} {later}"


def _check_corpora(corpora: Mapping[str, Any]) -> None:
    if not corpora:
        raise SettingsError("data.corpora: {} must name at least one corpus")
    for name, module in corpora.items():
        if not re.fullmatch(r"[\w-]+", str(name)):
            raise SettingsError(
                f"data.corpora: the name {name!r} must consist of letters, digits, - and _, as metrics are called by it"
            )
        if not isinstance(module, ShardModule):
            raise SettingsError(
                f"data.corpora.{name}: {type(module).__name__} must be a corpus of litgpt_moe_ext.data, such as "
                "litgpt_moe_ext.data.TextCorpus"
            )
    packings = {name: getattr(module, "packing", "stream") for name, module in corpora.items()}
    first = next(iter(packings))
    for name, packing in packings.items():
        if packing != packings[first]:
            raise SettingsError(
                f"data.corpora.{name}.packing: {packing!r} must be {packings[first]!r}, that of {first}; rows of a "
                "mixture are all made in the same way"
            )


def _row_shares(weights: Mapping[str, float], parts: Sequence[Part]) -> list[int]:
    # Padded rows hold fewer tokens, so a corpus of short documents needs more rows for the same share.
    shares = [Fraction(str(weights[part.name])) * len(part.windows) / max(part.windows.targets, 1) for part in parts]
    return whole_shares(shares)


def _epochs(parts: Sequence[Part], phases: Phases, length: RunLength) -> list[float]:
    counts = phases.counts(length.steps * length.rows_per_step)
    return [float(count) / len(part.windows) for count, part in zip(counts, parts, strict=True)]


def _percent(weights: Mapping[str, float], name: str) -> str:
    return f"{100 * weights[name] / sum(weights.values()):.4g}%"
