"""The fourth phase of a run: preparing its corpus and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.training.phases.inputs import (
    check_data,
    check_same_tokens,
    check_without_tokenizer,
    offers,
    open_tokenizer,
)
from litgpt_moe_ext.training.phases.start import same_corpora

if TYPE_CHECKING:
    from litgpt.data import DataModule
    from litgpt.tokenizer import Tokenizer

    from litgpt_moe_ext.training.phases.launch import Launched
    from litgpt_moe_ext.training.phases.start import Start


@dataclass(frozen=True)
class Prepared:
    """The data of a run.

    Attributes:
        data: The data module.
        tokenizer: Its tokenizer, or None.
        tokenizer_dir: Directory of the tokenizer, whose files are copied into the checkpoints, or None.
    """

    data: DataModule
    tokenizer: Tokenizer | None
    tokenizer_dir: Path | None


def prepare_data(launched: Launched, start: Start) -> Prepared:
    """Prepare the corpus, on the first process of each node before the others, and open the tokenizer.

    Raises:
        SettingsError: If the tokenizer does not suit the model or its weights, or a setting needs one that is missing.
    """
    settings = launched.plan.settings
    check_data(settings, launched.plan.config)
    data: Any = settings.data
    tokenizer_dir, tokenizer = settings.tokenizer_dir, None
    if data is None:
        from litgpt.data import TinyLlama

        data = TinyLlama()
    launched.plan.tell_length(data)
    if offers(data, "prepare_tokenizer") and tokenizer_dir is None:
        with same_corpora(start, launched.plan.plain), launched.fabric.rank_zero_first(local=True):
            tokenizer_dir = data.prepare_tokenizer()
    if tokenizer_dir is not None:
        tokenizer = open_tokenizer(tokenizer_dir, launched.plan.config.padded_vocab_size or 0)
        if start.initial_checkpoint_dir is not None:
            check_same_tokens(start.initial_checkpoint_dir, tokenizer_dir)
    else:
        check_without_tokenizer(settings)
    return Prepared(data, tokenizer, tokenizer_dir)
