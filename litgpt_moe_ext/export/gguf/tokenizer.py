"""The tokenizer of a checkpoint as metadata of a GGUF file.

llama.cpp knows byte-level BPE tokenizers by their pre-tokenizer, which it has built in under a name. Its converters
find the name by the hash of an encoded text and refuse what they have not seen; here it follows from the file.
"""

import json
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import SettingsError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
# Regular expressions of pre-tokenizers that llama.cpp computes, by its names. The two differ in how many digits make a
# token.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
_IGNORES_MERGES = ("llama-bpe",)


def tokenizer_metadata(checkpoint_dir: Path, vocab_size: int) -> dict[str, Any]:
    """Return the keys under `tokenizer.`.

    Args:
        checkpoint_dir: A checkpoint; without a tokenizer, only ids go in and out of the file.
        vocab_size: Rows of the model's embedding table.

    Raises:
        SettingsError: If llama.cpp would split texts otherwise, or if the tokenizer does not fit the model.
    """
    from litgpt.tokenizer import Tokenizer

    if not (checkpoint_dir / "tokenizer.json").is_file():
        if (checkpoint_dir / "tokenizer.model").is_file():
            raise _refusal(checkpoint_dir, "a sentencepiece model without tokenizer.json")
        return {"ggml.model": "none"}
    raw = json.loads((checkpoint_dir / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(checkpoint_dir)
    pre = _pre_tokenizer(checkpoint_dir, raw)
    if tokenizer.eos_id is None:
        raise SettingsError(
            f"checkpoint_dir: the tokenizer in {str(checkpoint_dir)!r} names no end of a text, and llama.cpp would "
            "take token 11 for it; add eos_token to its tokenizer_config.json"
        )
    tokens, kinds = _vocabulary(checkpoint_dir, raw, vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in raw["model"]["merges"]]
    metadata = {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": kinds,
        "ggml.eos_token_id": tokenizer.eos_id,
        "ggml.bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "ggml.add_bos_token": bool(tokenizer.use_bos),
        "ggml.add_eos_token": False,
        # One merge at least: the format has no empty lists, and this one never applies.
        "ggml.merges": merges or [f"{tokens[0]} {tokens[0]}"],
    }
    template = checkpoint_dir / "chat_template.jinja"
    if template.is_file():
        metadata["chat_template"] = template.read_text(encoding="utf-8")
    return metadata


def _pre_tokenizer(checkpoint_dir: Path, raw: dict[str, Any]) -> str:
    model = raw["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "BPE with byte_fallback" if model.get("byte_fallback") else model.get("type")
        raise _refusal(checkpoint_dir, kind)
    if raw.get("normalizer") is not None:
        raise _refusal(checkpoint_dir, f"normalizer {raw['normalizer'].get('type')}")
    pre = raw.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            name = "gpt-2"
        elif len(steps) == 2 and not last.get("use_regex", True) and steps[0].get("type") == "Split":
            name = _PRE_TOKENIZERS.get(steps[0]["pattern"].get("Regex", ""))
        else:
            name = None
        if name is not None and bool(model.get("ignore_merges")) == (name in _IGNORES_MERGES):
            return name
    raise _refusal(checkpoint_dir, f"pre_tokenizer {json.dumps(pre)[:120]}")


def _refusal(checkpoint_dir: Path, what: str) -> SettingsError:
    return SettingsError(
        f"checkpoint_dir: the tokenizer in {str(checkpoint_dir)!r} ({what}) must be a byte-level BPE that splits "
        "texts as GPT-2, Llama 3 or Qwen 2 do for a GGUF file; export with --format hf"
    )


def _vocabulary(checkpoint_dir: Path, raw: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[UNUSED{i}]" for i in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    entries = [(token, i, _NORMAL) for token, i in raw["model"]["vocab"].items()]
    entries += [
        (token["content"], token["id"], _CONTROL if token["special"] else _USER_DEFINED)
        for token in raw.get("added_tokens") or ()
    ]
    for token, i, kind in entries:
        if i >= vocab_size:
            raise SettingsError(
                f"checkpoint_dir: the tokenizer in {str(checkpoint_dir)!r} has the id {i} ({token!r}), but the model "
                f"only {vocab_size} embeddings; copy the tokenizer that it was trained with there"
            )
        tokens[i], kinds[i] = token, kind
    return tokens, kinds
