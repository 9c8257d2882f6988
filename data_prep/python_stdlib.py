"""Prepares the Python corpus ahead of a run: tokenizer, token shards, manifest.

    uv run python data_prep/python_stdlib.py --vocab_size 4096

A training run with ``PythonStdlib`` and the same settings finds the result; without this script it prepares it itself.
"""

from pathlib import Path

from jsonargparse import auto_cli


def main(
    data_path: Path = Path("data/python_stdlib"),
    source_path: Path | None = None,
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    seed: int = 42,
) -> None:
    """Prepare a corpus of Python source files.

    Args:
        data_path: Cache folder; the corpus gets a folder of its own in it.
        source_path: Folder of .py files to use instead of the standard library.
        vocab_size: Upper bound for the tokenizer's vocabulary.
        val_fraction: Share of the files that validate.
        seed: Decides which files validate.
    """
    # After parsing, so that --help and mistyped options answer at once.
    from litgpt_moe_ext.data.prepare import TOKENIZER_DIR
    from litgpt_moe_ext.data.python_files import prepare_python_files

    try:
        directory = prepare_python_files(data_path, source_path, vocab_size, val_fraction, seed)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"tokenizer_dir for LitGPT: {directory / TOKENIZER_DIR}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
