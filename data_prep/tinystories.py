"""Prepare TinyStories ahead of a run: tokenizer, token shards, manifest.

uv run python data_prep/tinystories.py --source_path stories/ --bpe.vocab_size 2048
"""

import sys
from functools import partial

from litgpt_moe_ext.data.command_line import prepare_from_command_line

main = partial(prepare_from_command_line, "TinyStories")

if __name__ == "__main__":
    sys.exit(main())
