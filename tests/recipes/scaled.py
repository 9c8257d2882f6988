"""Recipes made small: other numbers on the command line, everything else as in the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.recipes import corpora
from tests.recipes.files import path_of

BATCH, LENGTH = 8, 72

RAW_DATA: dict[str, Callable[[Path], None]] = {
    "code-moe-60m": corpora.code_parrot,
    "code-moe-800m": corpora.code_parrot,
    "gpt-dense-fineweb": corpora.fineweb_parquet,
    "gpt-moe-fineweb": corpora.gpt2_shards,
    "moe-200m-tinystories": corpora.stories_in_text_folders,
    "nanogpt-moe-tinystories": corpora.stories_in_parquet,
    "nanogpt-tinystories": corpora.stories_in_json,
}


def overrides(recipe: str, steps: int) -> list[str]:
    """Return the command line that makes a recipe a matter of seconds: width, depth, length, steps, rates."""
    model = yaml.safe_load(path_of(recipe).read_text(encoding="utf-8"))["model_config"]
    settings: dict[str, Any] = {
        "model_config.n_layer": min(2, model["n_layer"]),
        "model_config.n_embd": 8 * model["n_head"],
        "model_config.block_size": LENGTH,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": BATCH // 2,
        "train.max_tokens": steps * BATCH * LENGTH,
        "train.lr_warmup_steps": 2,
        "train.save_interval": max(1, steps // 2),
        "train.log_interval": 1,
        "eval.interval": max(1, steps // 2),
        "eval.max_iters": 2,
        "optimizer.lr": 3e-3,
        "sample.max_new_tokens": 4,
    }
    for name in ("intermediate_size", "moe_intermediate_size"):
        if name in model:
            settings[f"model_config.{name}"] = 32
    return [f"--{name}={value}" for name, value in settings.items()]
