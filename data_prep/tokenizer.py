"""Make a tokenizer directory that LitGPT and transformers read, for shards of tokens that need no other preparation.

    uv run python data_prep/tokenizer.py --source_path gpt2/ --out_dir data/tokenizers/gpt2

GPT-2's vocabulary and merges become a `tokenizer.json` with its end-of-text token; a tokenizer in Hugging Face format
is copied and checked.
"""

import sys
from pathlib import Path

from litgpt_moe_ext.errors import SettingsError, exit_status


def make_tokenizer(source_path: Path, out_dir: Path) -> None:
    """Make a tokenizer directory.

    Args:
        source_path: Folder with vocab.json and merges.txt (or encoder.json and vocab.bpe), or with a tokenizer.json.
        out_dir: The directory to make; must not exist.
    """
    from litgpt_moe_ext.data.tokenizer.files import read_tokenizer, write_tokenizer
    from litgpt_moe_ext.data.tokenizer.opening import check_tokenizer
    from litgpt_moe_ext.export.directory import new_directory

    files = read_tokenizer(source_path, "source_path")
    eos_id = check_tokenizer(files, source_path)
    with new_directory(out_dir) as directory:
        write_tokenizer(files, directory)
    print(f"tokenizer_dir for LitGPT: {out_dir} (end of text: {eos_id})", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the script with a command line, None takes it from `sys.argv`, and return its exit status."""

    def run() -> None:
        from jsonargparse import ArgumentError, auto_cli

        from litgpt_moe_ext.data.command_line import refusal

        try:
            auto_cli(make_tokenizer, as_positional=False, args=arguments, exit_on_error=False)
        except ArgumentError as error:
            raise SettingsError(refusal(error)) from error

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
