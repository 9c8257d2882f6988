"""Checks of a run's directory, weights, data and tokenizer, made before any long work starts.

None of them needs lightning.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import litgpt_moe_ext
from litgpt_moe_ext.errors import SettingsError, which_checkpoint
from litgpt_moe_ext.files.durable import WRITE_TEST, reason
from litgpt_moe_ext.files.lock import ProcessLock
from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE
from litgpt_moe_ext.training.phases.litgpt_data import check_litgpt_data
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.data import DataModule
    from litgpt.tokenizer import Tokenizer

    from litgpt_moe_ext.training.settings import Settings


def check_own(out_dir: Path) -> None:
    """Raise SettingsError if `out_dir` is a directory of other things, or a checkpoint."""
    place = os.path.realpath(out_dir)  # `resolve` fails at links in a circle
    others = {
        "the working directory": os.getcwd(),
        "your home directory": os.path.realpath(os.path.expanduser("~")),
        "the root of the file system": os.path.dirname(place),
        "where this package is installed": os.path.dirname(os.path.realpath(litgpt_moe_ext.__path__[0])),
    }
    for what, other in others.items():
        if place == other:
            raise SettingsError(f"out_dir: {quoted(out_dir)} is {what}; give the run a directory of its own")
    if (out_dir / WEIGHTS_FILE).is_file():
        raise SettingsError(
            f"out_dir: {quoted(out_dir)} is a checkpoint, which another run may replace as a whole; name a directory "
            "beside it, or --initial_checkpoint_dir to start from its weights"
        )


def check_writable(out_dir: Path) -> None:
    """Create `out_dir`; raise SettingsError unless it can serve as the run's own directory."""
    check_own(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=WRITE_TEST, ignore_cleanup_errors=True) as folder:
            lock = ProcessLock(Path(folder, "lock"))
            lock.take()
            lock.release()
    except OSError as error:
        raise SettingsError(
            f"out_dir: {quoted(out_dir)} must be a directory in which files can be created and locked "
            f"({reason(error, out_dir)}); choose another --out_dir"
        ) from error


def check_initial_checkpoint(directory: Path) -> None:
    """Raise SettingsError unless `initial_checkpoint_dir` holds a LitGPT model."""
    name, file = "initial_checkpoint_dir", directory / WEIGHTS_FILE
    if not file.is_file():
        where = "does not exist" if not os.path.isdir(directory) else f"has no {WEIGHTS_FILE}"
        hint = which_checkpoint(directory, file.name)
        raise SettingsError(f"{name}: {quoted(directory)} {where}{hint}")
    if not os.access(file, os.R_OK):
        raise SettingsError(f"{name}: {quoted(file)} cannot be read (Permission denied); name what you may read")


def check_data(settings: Settings, config: Config) -> None:
    """Raise SettingsError if the settings show that the data cannot suit the model; reads no documents.

    Also tells the data module the model's requirements, which it checks again once the data are prepared.
    """
    data: Any = settings.data
    if data is None:
        _check_tiny_llama()
    else:
        check_litgpt_data(data)
    if offers(data, "require_vocabulary"):
        data.require_vocabulary(config.padded_vocab_size or 0)  # LitGPT sets it when it makes a Config
    boundary = getattr(config, "attention_document_boundary", None)
    if offers(data, "require_documents") and boundary is not None:
        data.require_documents(boundary, getattr(config, "attention_document_token_id", None))
    if settings.tokenizer_dir is not None:
        return
    if not offers(data, "prepare_tokenizer"):
        check_without_tokenizer(settings)
    elif offers(data, "choose_tokenizer"):
        data.choose_tokenizer(None)


def offers(data: DataModule | None, method: str) -> bool:
    """Return whether a data module has a method that LitGPT's own lack."""
    return hasattr(type(data), method)  # on the class: looking up a missing attribute on a module may load lightning


def _check_tiny_llama() -> None:
    from litgpt.data import TinyLlama

    for path in map(Path, TinyLlama().required_paths):
        if not path.is_dir():
            raise SettingsError(
                f"data: null means litgpt.data.TinyLlama, whose folder {quoted(path)} does not exist; name a data "
                "module by class_path, as the recipes in configs/ do"
            )


def check_without_tokenizer(settings: Settings) -> None:
    """Raise SettingsError if a setting needs a tokenizer; call this if the run has none."""
    for name, wanted in (("sample.prompts", settings.sample.prompts), ("evaluate", settings.evaluate.wanted)):
        if wanted:
            raise SettingsError(f"{name}: needs a tokenizer; give tokenizer_dir, or leave it out")


def open_tokenizer(tokenizer_dir: Path, padded_vocab_size: int) -> Tokenizer:
    """Return the `litgpt.Tokenizer` of a directory.

    Raises:
        SettingsError: If there is none, it cannot be opened, has no end-of-text token, or has more tokens than the
            model's vocabulary.
    """
    from litgpt_moe_ext.data.tokenizer.opening import open_as_litgpt, vocabulary_size_of

    where = f"tokenizer_dir: {quoted(tokenizer_dir)}"
    try:
        tokenizer = open_as_litgpt(tokenizer_dir)
    except NotImplementedError as error:  # LitGPT found neither file
        raise SettingsError(f"{where} has neither tokenizer.json nor tokenizer.model") from error
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise SettingsError(f"{where} cannot be opened: {error}") from error
    if tokenizer.eos_id is None:
        raise SettingsError(
            f"{where} has no end-of-text token: documents could not be told apart, and generation would not stop. Add "
            '"eos_token" to its tokenizer_config.json.'
        )
    size = vocabulary_size_of(tokenizer)
    if size > padded_vocab_size:
        raise SettingsError(
            f"{where} has ids up to {size - 1}, beyond the model's padded_vocab_size: {padded_vocab_size}; set "
            f"model_config.padded_vocab_size to at least {size}"
        )
    return tokenizer


def check_same_tokens(initial_checkpoint_dir: Path, tokenizer_dir: Path) -> None:
    """Raise SettingsError if the tokenizer of the initial weights gives ids another meaning than the data's."""
    from litgpt_moe_ext.data.tokenizer.opening import same_ids

    if not same_ids(initial_checkpoint_dir, tokenizer_dir):
        raise SettingsError(
            f"initial_checkpoint_dir: {quoted(initial_checkpoint_dir)} has another tokenizer than the data, so the "
            "same ids mean other text; prepare the data with its tokenizer (data.tokenizer_dir), or remove its "
            "tokenizer.json to have the model learn the new ids"
        )
