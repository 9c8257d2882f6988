"""Importing a ready-made tokenizer into a corpus, as the few files of a tokenizer directory."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from litgpt_moe_ext.data.tokenizer.bpe import EOS_TOKEN
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import quoted

# What LitGPT and transformers read to encode texts and chats; models' own files beside them stay where they are.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Vocabulary and merges under the names of Hugging Face's slow tokenizers and of OpenAI's release of GPT-2.
_GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def read_tokenizer(directory: str | os.PathLike, setting: str = "tokenizer_dir") -> dict[str, bytes]:
    """Read the files of a tokenizer directory in Hugging Face format, or of a GPT-2 vocabulary with its merges.

    Args:
        directory: The folder.
        setting: The setting that named it, for errors.

    Returns:
        Contents by file name, among them `tokenizer.json`.

    Raises:
        SettingsError: There are no such files, or they are damaged.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return {name: (directory / name).read_bytes() for name in _FILES if (directory / name).is_file()}
    for vocabulary, merges in _GPT2_FILES:
        if (directory / vocabulary).is_file() and (directory / merges).is_file():
            return _gpt2(directory / vocabulary, directory / merges)
    pairs = " or ".join(f"{vocabulary} with {merges}" for vocabulary, merges in _GPT2_FILES)
    raise SettingsError(
        f"{setting}: {quoted(directory)} has no tokenizer.json (nor {pairs}); set {setting} to a folder with a "
        f"tokenizer in Hugging Face format{', or set bpe.vocab_size to train one' * (setting == 'tokenizer_dir')}"
    )


def litgpt_tokenizer(tokenizer: Any) -> dict[str, bytes]:
    """Return the files of an open `litgpt.Tokenizer`.

    Raises:
        SettingsError: It is a sentencepiece model, which the `tokenizers` library cannot run.
    """
    if tokenizer.backend != "huggingface":
        raise SettingsError(
            f"tokenizer_dir: the tokenizer {tokenizer.model_name!r} is a SentencePiece model, and preparing a corpus "
            "needs a tokenizer.json; transformers' AutoTokenizer writes one when it saves a fast tokenizer"
        )
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    config = {name: None if id_ is None else tokenizer.processor.id_to_token(id_) for name, id_ in names.items()}
    return _files(tokenizer.processor, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def write_tokenizer(files: dict[str, bytes], directory: Path) -> None:
    """Write files as from `read_tokenizer` into a folder, which is created if missing."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def tokenizer_hash(files: dict[str, bytes]) -> str:
    """Return the SHA-256 (hex) of the files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}:{len(files[name])}:".encode() + files[name])
    return digest.hexdigest()


def _gpt2(vocabulary: Path, merges: Path) -> dict[str, bytes]:
    try:
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(ids, pairs))
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise SettingsError(
            f"{vocabulary} and {merges} are not a GPT-2 vocabulary ({error}); download them again"
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS_TOKEN])
    config = {"tokenizer_class": "GPT2TokenizerFast", "bos_token": EOS_TOKEN, "eos_token": EOS_TOKEN}
    return _files(tokenizer, config)


def _files(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, bytes]:
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
