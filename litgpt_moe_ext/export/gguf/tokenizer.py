"""The tokenizer of a checkpoint as metadata of a GGUF file.

llama.cpp identifies byte-level BPE tokenizers by the name of a built-in pre-tokenizer. Its converters find the name by
the hash of an encoded text and refuse unknown hashes; here the name follows from the tokenizer's file.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.gguf import spm
from litgpt_moe_ext.export.source import ends_of_texts, read_tokenizer
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from litgpt import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    (_GPT2,): "gpt-2",
    (r"\p{N}", _GPT2): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST,): "qwen2",
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK): "deepseek-v3",
}
"""llama.cpp's names of pre-tokenizers, by the regular expressions by which they split, in order.

Only those that it computes exactly: in place of o200k's it has another one.
"""
_IGNORES_MERGES = ("llama-bpe",)


def tokenizer_metadata(checkpoint_dir: Path, vocab_size: int) -> dict[str, Any]:
    """Return the keys under `tokenizer.`.

    Args:
        checkpoint_dir: A checkpoint; without a tokenizer, the exported model takes and returns ids only.
        vocab_size: Rows of the model's embedding table.

    Raises:
        SettingsError: If llama.cpp would split texts differently, or if the tokenizer does not fit the model.
    """
    tokenizer = read_tokenizer(checkpoint_dir, vocab_size)
    if tokenizer is None:
        return {"ggml.model": "none"}
    if tokenizer.eos_id is None:
        raise SettingsError(
            f"checkpoint_dir: the tokenizer in {quoted(checkpoint_dir)} names no end of a text, and llama.cpp would "
            "take token 11 for it; add eos_token to its tokenizer_config.json"
        )
    if tokenizer.backend == "huggingface":
        pieces, metadata = _bpe(checkpoint_dir)
    else:
        pieces, metadata = spm.read(checkpoint_dir, vocab_size)
    tokens, kinds = [f"[UNUSED{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    for i, token, kind in pieces:
        tokens[i], kinds[i] = token, kind
    metadata |= {"ggml.tokens": tokens, "ggml.token_type": kinds} | _ends(tokenizer)
    # llama.cpp stops at each of these, and knows other ends only by their texts.
    others = ends_of_texts(checkpoint_dir, tokenizer, vocab_size)[1:]
    metadata |= dict(zip(("ggml.eot_token_id", "ggml.eom_token_id"), others, strict=False))
    template = _chat_template(checkpoint_dir)
    return metadata if template is None else metadata | {"chat_template": template}


def _chat_template(checkpoint_dir: Path) -> str | None:
    # In a file of its own or, as in most published models, in the configuration: alone, or the default one of several.
    if (file := checkpoint_dir / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    if not (file := checkpoint_dir / "tokenizer_config.json").is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _ends(tokenizer: "Tokenizer") -> dict[str, Any]:
    # The tokens that LitGPT adds around a text, whether LitGPT or the tokenizer's own file asks for them.
    ids = tokenizer.encode("a").tolist()
    return {
        "ggml.eos_token_id": tokenizer.eos_id,
        "ggml.bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "ggml.add_bos_token": tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id],
        "ggml.add_eos_token": ids[-1:] == [tokenizer.eos_id],
    }


def _bpe(checkpoint_dir: Path) -> tuple[list[spm.Piece], dict[str, Any]]:
    raw = json.loads((checkpoint_dir / "tokenizer.json").read_text(encoding="utf-8"))
    model = raw["model"]
    for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise _refusal(checkpoint_dir, f"BPE with {name}")
    if model.get("type") != "BPE":
        raise _refusal(checkpoint_dir, str(model.get("type")))
    normalizer = raw.get("normalizer") or {}
    if normalizer and normalizer.get("normalizers") != []:
        raise _refusal(checkpoint_dir, f"normalizer {normalizer.get('type')}")
    pre = raw.get("pre_tokenizer") or {}
    name = PRE_TOKENIZERS.get(tuple(_expressions(pre)))
    if name is None or bool(model.get("ignore_merges")) != (name in _IGNORES_MERGES):
        raise _refusal(checkpoint_dir, f"pre_tokenizer {json.dumps(pre)[:120]}")
    pieces = [(i, token, _NORMAL) for token, i in model["vocab"].items()]
    for token in raw.get("added_tokens") or ():
        if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise _refusal(checkpoint_dir, f"{token['content']!r}, which takes space or words beside it into account")
        pieces.append((token["id"], token["content"], _CONTROL if token["special"] else _USER_DEFINED))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    # At least one merge, because the format has no empty lists; this one never applies.
    merges = merges or [f"{pieces[0][1]} {pieces[0][1]}"]
    return pieces, {"ggml.model": "gpt2", "ggml.pre": name, "ggml.merges": merges}


def _expressions(pre: dict[str, Any]) -> list[str]:
    """Return the regular expressions by which a pre-tokenizer splits; empty if it does more than that."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return []
    found = []
    for step in steps[:-1]:
        isolates = step.get("behavior") == "Isolated" and not step.get("invert")
        if step.get("type") == "Split" and isolates:
            found.append(step["pattern"].get("Regex", ""))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            found.append(r"\p{N}")
        else:
            return []
    return [*found, _GPT2] if last.get("use_regex", True) else found


def _refusal(checkpoint_dir: Path, what: str) -> SettingsError:
    return SettingsError(
        f"checkpoint_dir: the tokenizer in {quoted(checkpoint_dir)} ({what}) must be a byte-level BPE that splits "
        "texts as GPT-2, Llama 3, Qwen 2, SmolLM or DeepSeek-V3 do for a GGUF file; export with --format hf"
    )
