"""Prepares FineWeb-Edu ahead of a run: tokenizer, token shards, manifest.

    uv run python data_prep/fineweb.py --source_path parquet/ --tokenizer_dir gpt2/

Shards of tokens that somebody else made, such as build-nanogpt's and llm.c's, need no preparation: ``TokenShards``
reads them. A training run with ``TextCorpus`` (or ``HubDataset``) and the same settings finds what this script made.
"""

from pathlib import Path
from typing import Literal

from litgpt_moe_ext.data.pipeline.corpora import HubDataset, TextCorpus
from litgpt_moe_ext.data.pipeline.scripts import prepare, run_script
from litgpt_moe_ext.data.pipeline.tokenizer import BPESettings


def main(
    source_path: Path | None = None,
    subset: str = "sample-10BT",
    data_path: Path = Path("data/fineweb_edu"),
    tokenizer_dir: Path | None = None,
    bpe: BPESettings | None = None,
    prepend_bos: bool = False,
    val_fraction: float = 0.01,
    field: str = "text",
    invalid_utf8: Literal["error", "replace"] = "error",
    workers: int | None = None,
    seed: int = 42,
    streaming: bool = False,
    log_to_wandb: bool = False,
    wandb_artifact: str | None = None,
    wandb_project: str | None = None,
) -> None:
    """Prepare FineWeb-Edu.

    Args:
        source_path: Folder with the parquet files. Default: the data set on the hub.
        subset: Configuration of the data set on the hub.
        data_path: Cache folder; every corpus gets a folder of its own in it.
        tokenizer_dir: Tokenizer in Hugging Face format (or GPT-2's vocabulary and merges) to encode with.
        bpe: Instead: train a BPE tokenizer, for example with --bpe.vocab_size 2048.
        prepend_bos: Whether each document starts with the BOS token. Each ends with EOS.
        val_fraction: Share of the documents that validate where no files are named for it.
        field: JSON key, or column, that holds the text.
        invalid_utf8: What to do about bytes that are no UTF-8.
        workers: Processes that encode. Default: one per core; below 32 MB one, with a thread per core.
        seed: Decides which documents validate.
        streaming: Without source_path: read the hub's files as they are encoded, instead of downloading them first.
        log_to_wandb: Log the corpus as a W&B artifact; WANDB_MODE=offline keeps it for `wandb sync`.
        wandb_artifact: Name of the artifact.
        wandb_project: W&B project of the artifact.
    """
    settings = dict(locals())
    wandb = {name: settings.pop(name) for name in ("log_to_wandb", "wandb_artifact", "wandb_project")}
    subset, source_path, streaming = (settings.pop(name) for name in ("subset", "source_path", "streaming"))
    if source_path is None:
        corpus = HubDataset(dataset="HuggingFaceFW/fineweb-edu", config=subset, streaming=streaming, **settings)
    elif streaming:
        raise ValueError(f"streaming has no effect on the files in source_path={str(source_path)!r}. Leave out one.")
    else:
        corpus = TextCorpus(source_path=source_path, pattern="**/*.parquet", **settings)
    prepare(corpus.prepare, **wandb)


if __name__ == "__main__":
    run_script(main)
