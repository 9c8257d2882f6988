"""Prepares the Python corpus ahead of a run: tokenizer, token shards, manifest.

    uv run python data_prep/python_stdlib.py --vocab_size 4096

A training run with ``PythonStdlib`` and the same settings finds the result; without this script it prepares it itself.
"""

from functools import partial
from pathlib import Path

from litgpt_moe_ext.data.pipeline.python_files import prepare_python_files
from litgpt_moe_ext.data.pipeline.scripts import prepare, run_script


def main(
    data_path: Path = Path("data/python_stdlib"),
    source_path: Path | None = None,
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    seed: int = 42,
    log_to_wandb: bool = False,
    wandb_artifact: str | None = None,
    wandb_project: str | None = None,
) -> None:
    """Prepare a corpus of Python source files.

    Args:
        data_path: Cache folder; the corpus gets a folder of its own in it.
        source_path: Folder of .py files to use instead of the standard library.
        vocab_size: Upper bound for the tokenizer's vocabulary.
        val_fraction: Share of the files that validate.
        seed: Decides which files validate.
        log_to_wandb: Log the corpus as a W&B artifact; WANDB_MODE=offline keeps it for `wandb sync`.
        wandb_artifact: Name of the artifact.
        wandb_project: W&B project of the artifact.
    """
    settings = dict(locals())
    wandb = {name: settings.pop(name) for name in ("log_to_wandb", "wandb_artifact", "wandb_project")}
    prepare(partial(prepare_python_files, **settings), **wandb)


if __name__ == "__main__":
    run_script(main)
