"""Makes a tokenizer directory that LitGPT and transformers read, for shards of tokens that need no other preparation.

    uv run python data_prep/tokenizer.py --source_path gpt2/ --out_dir data/tokenizers/gpt2

GPT-2's vocabulary and merges become a ``tokenizer.json`` with its end-of-text token; a tokenizer in Hugging Face format
is copied and checked.
"""

from pathlib import Path

from litgpt_moe_ext.data.pipeline.corpus import atomic_directory
from litgpt_moe_ext.data.pipeline.scripts import run_script
from litgpt_moe_ext.data.pipeline.tokenizer import require_eos
from litgpt_moe_ext.data.pipeline.tokenizer_files import read_tokenizer, write_tokenizer


def main(source_path: Path, out_dir: Path) -> None:
    """Make a tokenizer directory.

    Args:
        source_path: Folder with vocab.json and merges.txt (or encoder.json and vocab.bpe), or with a tokenizer.json.
        out_dir: The directory to make; must not exist.
    """
    files = read_tokenizer(source_path)
    if out_dir.exists():
        raise FileExistsError(f"out_dir={str(out_dir)!r} exists. Move it, or name another.")
    with atomic_directory(out_dir) as directory:
        write_tokenizer(files, directory)
        try:
            eos_id = require_eos(directory)
        except ValueError as error:
            raise ValueError(str(error).replace(str(directory), str(source_path))) from error
    print(f"tokenizer_dir for LitGPT: {out_dir} (end of text: {eos_id})", flush=True)


if __name__ == "__main__":
    run_script(main)
