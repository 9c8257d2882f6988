"""Prepare FineWeb-Edu ahead of a run: tokenizer, token shards, manifest.

uv run python data_prep/fineweb.py --source_path parquet/ --tokenizer_dir gpt2/
"""

import sys
from functools import partial

from litgpt_moe_ext.data.command_line import prepare_from_command_line

main = partial(prepare_from_command_line, "FineWeb")

if __name__ == "__main__":
    sys.exit(main())
