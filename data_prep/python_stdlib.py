"""Prepare the source code of Python's standard library ahead of a run: tokenizer, token shards, manifest.

uv run python data_prep/python_stdlib.py --vocab_size 4096
"""

import sys
from functools import partial

from litgpt_moe_ext.data.command_line import prepare_from_command_line

main = partial(prepare_from_command_line, "PythonStdlib")

if __name__ == "__main__":
    sys.exit(main())
