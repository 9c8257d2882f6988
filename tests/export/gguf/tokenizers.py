"""Small tokenizers of the kinds that llama.cpp computes."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.trainers import BpeTrainer

from litgpt_moe_ext.export.gguf import tokenizer as known

TEXT = (
    "def reverse(items):\n    return items[::-1]  # 12345 it's déjà-vu IT'S 日本語カナ 3.14159\r\n\n\tdone   \n"
    "x_1 += y2*(z-0x1F)/100000; «Ünïcödé» naïve Ελλάδα Москва! 😀👍🏽 e\u0301 ²½  end "
)


def _splits(*expressions: str) -> PreTokenizer:
    steps = [Split(Regex(expression), "isolated") for expression in expressions]
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    **{
        name: _splits(*expressions)
        for expressions, name in known.PRE_TOKENIZERS.items()
        if "gpt" not in name and "smol" not in name
    },
}


def train_bpe(folder: Path, name: str, vocab_size: int) -> Tokenizer:
    """Write a byte-level BPE that splits texts like another, and return it."""
    tokenizer = Tokenizer(BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]
    if name == "deepseek-v3":
        tokenizer.normalizer = normalizers.Sequence([])  # as its file has it
    alphabet = ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 5, BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def train_spm(folder: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    """Write a SentencePiece model with Llama's options, and return it."""
    llama = {
        "vocab_size": 340,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    written = io.BytesIO()
    lines = [line for line in TEXT.splitlines() if line.strip()] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, **{**llama, **options}
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
