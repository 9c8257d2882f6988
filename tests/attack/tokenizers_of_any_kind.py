"""Tokenizers in Hugging Face format, of any kind and as somebody may have saved them."""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_ENDS = (("<s>", "</s>"), ("<|endoftext|>", "<|endoftext|>"), ("<bos>", "<|endoftext|>"))


def write_tokenizer(chance: random.Random, folder: Path, texts: list[str]) -> None:
    """Write a tokenizer that has learned from texts.

    Args:
        chance: What chooses.
        folder: Is made.
        texts: The documents.
    """
    begin, end = chance.choice(_ENDS)
    # What it has learned as text it could not tell from the token, and would be refused.
    texts = [text.replace(begin, "").replace(end, "") for text in texts]
    tokenizer = chance.choice((_bytes, _pieces, _characters, _words))(chance, texts)
    marked = chance.random() < 0.7
    tokenizer.add_tokens([AddedToken(t, special=marked, normalized=not marked) for t in dict.fromkeys((begin, end))])
    if chance.random() < 0.5:
        ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((begin, end))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A {end}", special_tokens=ids)
    if chance.random() < 0.3:
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=9)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _bytes(chance: random.Random, texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(chance.random() < 0.5)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _pieces(chance: random.Random, texts: list[str]) -> Tokenizer:
    # SentencePiece's unigrams.
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = chance.choice((normalizers.NFKC(), normalizers.Strip(), normalizers.Lowercase()))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=chance.choice(("always", "first", "never")))
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([*texts, "a few words"], trainer)
    return tokenizer


def _characters(_chance: random.Random, _texts: list[str]) -> Tokenizer:
    # Llama 2's bytes in place of characters.
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "▁": 257, "e": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.ByteFallback()
    return tokenizer


def _words(chance: random.Random, texts: list[str]) -> Tokenizer:
    words = sorted({word for text in texts for word in text.split()})
    rare = [f"rare {number}" for number in range(chance.choice((0, 70_000)))]  # for ids beyond 16 bits
    vocabulary = {word: number for number, word in enumerate(("<unk>", *rare, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
