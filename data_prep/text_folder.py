"""Prepares files of text ahead of a run: tokenizer, token shards, manifest.

    uv run python data_prep/text_folder.py --source_path my_texts/ --bpe.vocab_size 8192
    uv run python data_prep/text_folder.py --source_path text/ --pattern '**/*.jsonl' --field body --bpe.vocab_size 8192

A training run with ``TextCorpus`` and the same settings finds the result; without this
script it prepares it itself.
"""

from pathlib import Path
from typing import Literal

from litgpt_moe_ext.data.pipeline.corpora import TextCorpus
from litgpt_moe_ext.data.pipeline.scripts import prepare, run_script
from litgpt_moe_ext.data.pipeline.tokenizer import BPESettings


def main(
    source_path: Path,
    val_path: Path | None = None,
    pattern: str = "**/*.txt",
    separator: str | None = None,
    data_path: Path = Path("data/text"),
    tokenizer_dir: Path | None = None,
    bpe: BPESettings | None = None,
    prepend_bos: bool = False,
    val_fraction: float = 0.05,
    field: str = "text",
    invalid_utf8: Literal["error", "replace"] = "error",
    workers: int | None = None,
    seed: int = 42,
    log_to_wandb: bool = False,
    wandb_artifact: str | None = None,
    wandb_project: str | None = None,
) -> None:
    """Prepare text, JSON or parquet files.

    Args:
        source_path: A file, or a folder with the files to train on at any depth.
        val_path: A file or a folder to validate on. Default: a share of the training documents.
        pattern: Which files in the folders, as a glob.
        separator: What ends a document in a plain text file, for example <|endoftext|>.
        data_path: Cache folder; every corpus gets a folder of its own in it.
        tokenizer_dir: Tokenizer in Hugging Face format (or GPT-2's vocabulary and merges) to encode with.
        bpe: Instead: train a BPE tokenizer, for example with --bpe.vocab_size 2048.
        prepend_bos: Whether each document starts with the BOS token. Each ends with EOS.
        val_fraction: Share of the documents that validate where no files are named for it.
        field: JSON key, or column, that holds the text.
        invalid_utf8: What to do about bytes that are no UTF-8.
        workers: Processes that encode. Default: one per core; below 32 MB one, with a thread per core.
        seed: Decides which documents validate.
        log_to_wandb: Log the corpus as a W&B artifact; WANDB_MODE=offline keeps it for `wandb sync`.
        wandb_artifact: Name of the artifact.
        wandb_project: W&B project of the artifact.
    """
    settings = dict(locals())
    wandb = {name: settings.pop(name) for name in ("log_to_wandb", "wandb_artifact", "wandb_project")}
    prepare(TextCorpus(**settings).prepare, **wandb)


if __name__ == "__main__":
    run_script(main)
