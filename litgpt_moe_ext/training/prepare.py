"""The fourth phase of a run: its corpus and its tokenizer are there, and suit model and strategy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from litgpt_moe_ext.data.mixture.settings import RunLength
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.checks import open_tokenizer

if TYPE_CHECKING:
    from litgpt.data import DataModule
    from litgpt.tokenizer import Tokenizer

    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.training.launch import Launched


@dataclass(frozen=True)
class Prepared:
    """What a run trains on.

    Attributes:
        data: The data module.
        tokenizer: Its tokenizer, if it has one.
        tokenizer_dir: Where that comes from; its files become part of the checkpoints.
    """

    data: DataModule
    tokenizer: Tokenizer | None
    tokenizer_dir: Path | None


def prepare_data(launched: Launched) -> Prepared:
    """Prepare the corpus, on the first process of each node before the others, and open the tokenizer.

    Raises:
        SettingsError: If the tokenizer does not suit the model, or something that needs one has none.
    """
    settings, config = launched.plan.settings, cast("Config", launched.plan.config)
    vocabulary = config.padded_vocab_size or 0  # LitGPT sets it when it makes a Config
    data, tokenizer_dir, tokenizer = settings.data, settings.tokenizer_dir, None
    if data is None:
        from litgpt.data import TinyLlama

        data = TinyLlama()
        for path in map(Path, data.required_paths):
            if not path.is_dir():
                raise SettingsError(
                    f"data: null means litgpt.data.TinyLlama, whose folder {str(path)!r} does not exist; name a data "
                    "module by class_path, as the recipes in configs/ do"
                )
    if hasattr(data, "require_vocabulary"):  # before a preparation that may take hours
        data.require_vocabulary(vocabulary)
    boundary, token_id = config.attention_document_boundary, config.attention_document_token_id
    if hasattr(data, "require_documents") and boundary is not None:
        data.require_documents(boundary, token_id)
    if hasattr(data, "plan_run"):
        train = launched.plan.train
        data.plan_run(RunLength(launched.plan.total_steps, train.global_batch_size, settings.eval.max_iters))
    if hasattr(data, "prepare_tokenizer") and tokenizer_dir is None:
        with launched.fabric.rank_zero_first(local=True):
            tokenizer_dir = data.prepare_tokenizer()
    if tokenizer_dir is not None:
        tokenizer = open_tokenizer(tokenizer_dir, vocabulary)
    for name, wanted in (("sample.prompts", settings.sample.prompts), ("evaluate", settings.evaluate.wanted)):
        if wanted and tokenizer is None:
            raise SettingsError(f"{name}: needs a tokenizer; give tokenizer_dir, or leave it out")
    return Prepared(data, tokenizer, tokenizer_dir)
