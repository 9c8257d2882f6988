"""Recipes at the full size of their models on a CPU: fifty optimizer steps with a small batch, and the loss.

    python benchmarks/full_size.py                              # code-moe-60m and gpt-moe-fineweb, half an hour
    python benchmarks/full_size.py --recipes code-moe-60m --steps 20

Corpora and tokenizers are made from Python's standard library, in the files and schema that the recipes expect
(CodeParrot's `.json.gz`; `.bin` shards of GPT-2 tokens), with as large a vocabulary as that much text yields.
Everything else is as in the recipe, except the batch, the number of steps and float32.
"""

import argparse
import ast
import csv
import gzip
import json
import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from litgpt_moe_ext.data.pipeline.shards import write_shard
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe

ROOT = Path(__file__).resolve().parents[1]
STDLIB = Path(sysconfig.get_path("stdlib"))
SKIPPED = {"site-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "__pycache__"}


def source_files() -> list[str]:
    """Return the sources of the standard library, without tests and tables."""
    paths = sorted(path for path in STDLIB.rglob("*.py") if not SKIPPED & set(path.relative_to(STDLIB).parts))
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def prose() -> list[str]:
    """Return English texts: the language reference that `help()` prints, and long docstrings."""
    topics = runpy.run_path(str(STDLIB / "pydoc_data" / "topics.py"))["topics"]
    return [*topics.values(), *(text for source in source_files() for text in _docstrings(source))]


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node) or ""
            if len(text) > 200:
                yield text


def code_parrot(folder: Path) -> None:
    """Write four shards of CodeParrot-clean and a tokenizer like StarCoder2's."""
    files = source_files()
    shards = folder / "data" / "codeparrot" / "shards"
    shards.mkdir(parents=True)
    for number in range(4):
        # The last one validates.
        rows = files[60:][number::3] if number < 3 else files[:60]
        lines = "".join(json.dumps({"content": text}) + "\n" for text in rows)
        (shards / f"file-{number + 1:012}.json.gz").write_bytes(gzip.compress(lines.encode()))
    train_bpe(files, BPESettings(49152, ["<|endoftext|>"]), folder / "data" / "starcoder2")


def fineweb(folder: Path) -> None:
    """Write shards like GPT-2's, with end-of-text before every document, and their tokenizer."""
    texts = prose()
    tokenizer_dir = folder / "data" / "tokenizers" / "gpt2"
    train_bpe(texts, BPESettings(50257, ["<|endoftext|>"]), tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    (end,) = tokenizer("<|endoftext|>")["input_ids"]
    shards = folder / "data" / "fineweb_edu" / "shards"
    shards.mkdir(parents=True)
    for name, part in (("val_000000", texts[::20]), ("train_000001", [t for i, t in enumerate(texts) if i % 20])):
        tokens = [token for text in part for token in (end, *tokenizer(text)["input_ids"])]
        write_shard(shards / f"edufineweb_{name}.bin", np.array(tokens), 50257)


CORPORA = {"code-moe-60m": code_parrot, "gpt-moe-fineweb": fineweb}


def train(recipe: str, folder: Path, steps: int, batch: int) -> list[tuple[int, float]]:
    """Run the recipe in `folder` and return steps and losses."""
    import yaml

    path = ROOT / "configs" / f"{recipe}.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    overrides = {
        "train.global_batch_size": batch,
        "train.micro_batch_size": 1,
        "train.max_tokens": steps * batch * settings["model_config"]["block_size"],
        "train.lr_warmup_steps": steps // 5,
        "train.log_interval": 1,
        "eval.interval": steps + 1,
        "eval.max_iters": 4,
        "precision": "32-true",
        "float32_matmul_precision": "medium",
    }
    arguments = [f"--{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, str(ROOT / "run_train.py"), "--config", str(path), *arguments]
    subprocess.run(command, cwd=folder, check=True, env={"TOKENIZERS_PARALLELISM": "false", **os.environ})
    with (folder / settings["out_dir"] / "metrics.csv").open(encoding="utf-8") as file:
        return [(int(row["step"]), float(row["train_loss"])) for row in csv.DictReader(file) if row.get("train_loss")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipes", nargs="+", default=list(CORPORA), choices=list(CORPORA))
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=2, help="sequences of the recipe's length per step")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "out" / "full_size", help="must not exist yet")
    arguments = parser.parse_args()
    folders = {recipe: arguments.out_dir / recipe for recipe in arguments.recipes}
    if there := [str(folder) for folder in folders.values() if folder.exists()]:
        parser.error(f"--out-dir: {', '.join(there)} must not exist yet; name another folder")
    for recipe, folder in folders.items():
        CORPORA[recipe](folder)
        losses = train(recipe, folder, arguments.steps, arguments.batch)
        shown = [losses[0], *(pair for pair in losses if pair[0] % 10 == 0)]
        print(f"{recipe}: loss " + ", ".join(f"{loss:.2f} (step {step})" for step, loss in shown), flush=True)


if __name__ == "__main__":
    main()
