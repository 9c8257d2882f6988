"""Checks before any long work starts. Each error names the setting, its value and what would be right."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.config.litgpt_fields import RANGES, check_ranges
from litgpt_moe_ext.durable import WRITE_TEST
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.optim.arguments import check_rates
from litgpt_moe_ext.training.parallel.combinations import check_combination

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.tokenizer import Tokenizer

    from litgpt_moe_ext.training.settings import Settings


def check_batch(global_batch_size: int, micro_batch_size: int, processes: int) -> None:
    """Raise SettingsError unless the global batch can be made of whole micro-batches on every process."""
    unit = micro_batch_size * processes
    if global_batch_size % unit:
        below, above = global_batch_size // unit * unit, -(-global_batch_size // unit) * unit
        nearest = f"{below} or {above}" if below else str(above)
        raise SettingsError(
            f"train.global_batch_size: {global_batch_size} is not a multiple of train.micro_batch_size "
            f"({micro_batch_size}) times the number of processes ({processes}); the nearest that are: {nearest}"
        )


def check_model(config: Config) -> None:
    """Raise SettingsError unless the numbers of a model are ones that a model can have."""
    check_ranges({name: getattr(config, name) for name in RANGES}, "model_config.")


def check_length(max_seq_length: int | None, block_size: int) -> None:
    """Raise SettingsError unless the training length is one the model has positions for."""
    if max_seq_length is not None and not 1 <= max_seq_length <= block_size:
        raise SettingsError(
            f"train.max_seq_length: {max_seq_length} must be from 1 to the model's block_size: {block_size}"
        )


def check_steps(max_tokens: int, tokens_per_step: int) -> None:
    """Raise SettingsError unless the tokens suffice for a step."""
    if max_tokens < tokens_per_step:
        raise SettingsError(
            f"train.max_tokens: {max_tokens} must be at least one step of {tokens_per_step} tokens "
            "(train.global_batch_size times the sequence length)"
        )


def check_settings(settings: Settings, config: Config) -> None:
    """Raise SettingsError unless the settings of a run go together, as far as that needs neither processes nor data."""
    length = settings.train.max_seq_length
    check_model(config)
    check_length(length, config.block_size)
    if settings.train.epochs is None:
        check_steps(settings.train.max_tokens, settings.train.global_batch_size * (length or config.block_size))
    elif hasattr(settings.data, "plan_run"):
        raise SettingsError(
            f"train.epochs: {settings.train.epochs} must be null for a mixture, whose corpora have epochs of their "
            "own; give train.max_tokens"
        )
    check_rates(settings)
    check_combination(settings)


def check_writable(out_dir: Path) -> None:
    """Raise an error unless `out_dir` can be a directory of the run's own; creates it."""
    if out_dir.resolve() == Path.cwd():
        raise SettingsError(f"out_dir: {str(out_dir)!r} is the working directory; name one for this run alone")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out_dir, prefix=WRITE_TEST):
            pass
    except OSError as error:
        raise SettingsError(
            f"out_dir: {str(out_dir)!r} cannot be written to ({error.strerror or error}); choose another --out_dir"
        ) from error


def open_tokenizer(tokenizer_dir: Path, padded_vocab_size: int) -> Tokenizer:
    """Return the `litgpt.Tokenizer` of a directory.

    Raises:
        SettingsError: If there is none, it cannot be opened, does not separate documents, or has more tokens than the
            model's vocabulary.
    """
    from litgpt.tokenizer import Tokenizer

    from litgpt_moe_ext.data.tokenizer.opening import vocabulary_size

    try:
        tokenizer = Tokenizer(tokenizer_dir)
    except NotImplementedError as error:  # how LitGPT says that it found neither file
        raise SettingsError(
            f"tokenizer_dir: {str(tokenizer_dir)!r} has neither tokenizer.json nor tokenizer.model"
        ) from error
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise SettingsError(f"tokenizer_dir: {str(tokenizer_dir)!r} cannot be opened: {error}") from error
    if tokenizer.eos_id is None:
        raise SettingsError(
            f"tokenizer_dir: {str(tokenizer_dir)!r} has no end-of-text token: documents could not be told apart, and "
            'generation would not stop. Add "eos_token" to its tokenizer_config.json.'
        )
    processor: Any = tokenizer.processor
    size = vocabulary_size(processor) if tokenizer.backend == "huggingface" else tokenizer.vocab_size
    if size > padded_vocab_size:
        raise SettingsError(
            f"tokenizer_dir: {str(tokenizer_dir)!r} has ids up to {size - 1}, beyond the model's padded_vocab_size: "
            f"{padded_vocab_size}; set model_config.padded_vocab_size to at least {size}"
        )
    return tokenizer


def check_checkpoint_dir(name: str, directory: Path) -> None:
    """Raise SettingsError unless `directory`, the value of setting `name`, holds a LitGPT model."""
    if not (directory / "lit_model.pth").is_file():
        where = "does not exist" if not os.path.isdir(directory) else "has no lit_model.pth"
        raise SettingsError(f"{name}: {str(directory)!r} {where}")
