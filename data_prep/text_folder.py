"""Prepare files of text ahead of a run: tokenizer, token shards, manifest.

uv run python data_prep/text_folder.py --source_path my_texts/ --bpe.vocab_size 8192
uv run python data_prep/text_folder.py --source_path text/ --pattern '**/*.jsonl' --field body --bpe.vocab_size 8192
"""

import sys
from functools import partial

from litgpt_moe_ext.data.command_line import prepare_from_command_line

main = partial(prepare_from_command_line, "TextCorpus")

if __name__ == "__main__":
    sys.exit(main())
