"""Prepare CodeParrot-clean ahead of a run: tokenizer, token shards, manifest.

uv run python data_prep/codeparrot.py --source_path shards/ --tokenizer_dir starcoder2/
"""

import sys
from functools import partial

from litgpt_moe_ext.data.command_line import prepare_from_command_line

main = partial(prepare_from_command_line, "CodeParrot")

if __name__ == "__main__":
    sys.exit(main())
