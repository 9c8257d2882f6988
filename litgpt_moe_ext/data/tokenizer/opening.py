"""Opening tokenizers, and finding their special tokens and vocabulary size."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer

from litgpt_moe_ext.data.tokenizer.files import read_tokenizer
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer as LitGPTTokenizer

LARGEST_VOCABULARY = 1 << 24
# Names of special tokens, and what does not work without one.
_CONSEQUENCES = {
    "eos": ("end-of-sequence", "documents cannot be kept apart"),
    "bos": ("beginning-of-sequence", "none can be put before a document"),
}


def open_for_documents(directory: str | os.PathLike) -> Tokenizer:
    """Open a tokenizer for encoding documents rather than prompts.

    Text such as `<|endoftext|>` inside a document stays ordinary text instead of becoming the special id, which would
    end the document in its middle. Encode with `add_special_tokens=False`.

    Raises:
        SettingsError: The directory has no `tokenizer.json`, or it or its `tokenizer_config.json` is damaged.
    """
    files = read_tokenizer(directory)
    tokenizer = parse_tokenizer(files["tokenizer.json"], str(Path(directory) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    # Some tokenizers name special tokens only there, and their text would be matched as that of other added tokens.
    config = _json(files, Path(directory) / "tokenizer_config.json")
    named = [_content(value) for name, value in config.items() if name.endswith("_token")]
    added = tokenizer.get_added_tokens_decoder().values()
    tokenizer.add_special_tokens([token for token in added if token.content in named])
    return tokenizer


def parse_tokenizer(content: bytes, name: str) -> Tokenizer:
    """Return the tokenizer in the content of a `tokenizer.json`, for texts of any length.

    Args:
        content: The file.
        name: Its name in error messages.

    Raises:
        SettingsError: It is damaged.
    """
    try:
        return _for_any_length(Tokenizer.from_buffer(content))
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise SettingsError(f"{name} is not a tokenizer ({error}); download or make it again") from error


def _for_any_length(tokenizer: Tokenizer) -> Tokenizer:
    # The saved tokenizer may truncate or pad texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def open_as_litgpt(directory: Path) -> "LitGPTTokenizer":
    """Open a tokenizer as LitGPT does, for texts of any length, with one id or none for what begins and what ends them.

    LitGPT takes over -1, by which SentencePiece means none, and the list of all that may end a text in a
    `generation_config.json`, of which the first counts.

    Raises:
        Exception: Whatever LitGPT and its libraries raise.
    """
    from litgpt.tokenizer import Tokenizer as LitGPTTokenizer

    try:
        tokenizer = LitGPTTokenizer(directory)
    except KeyError as error:
        if error.args != ("tokenizer_class",):
            raise
        raise ValueError(
            'its tokenizer_config.json names no class; add "tokenizer_class": "PreTrainedTokenizerFast" to it'
        ) from error
    if isinstance(tokenizer.processor, Tokenizer):
        _for_any_length(tokenizer.processor)
    for name in ("bos_id", "eos_id"):
        ids = getattr(tokenizer, name)
        first = next(iter(ids), None) if isinstance(ids, list) else ids
        setattr(tokenizer, name, None if first == -1 else first)
    # Which LitGPT's tokenizer would raise an error about.
    tokenizer.use_bos = tokenizer.use_bos and tokenizer.bos_id is not None
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return one more than the highest id; if ids have gaps, this exceeds the number of tokens.

    Raises:
        SettingsError: The highest id is so large that no model has an embedding for it.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True)
    size = 1 + max(ids.values(), default=-1)
    if size > LARGEST_VOCABULARY:
        token = max(ids, key=ids.__getitem__)
        raise SettingsError(
            f"tokenizer_dir: token {token!r} has id {size - 1} in a tokenizer of {len(ids)} tokens, which would need "
            f"an embedding of {size} rows; give it an id below {LARGEST_VOCABULARY} in tokenizer.json"
        )
    return size


def same_ids(directory: Path, other: Path) -> bool:
    """Return whether every id that two tokenizers share is the same token in both; True if one has no tokenizer.json.

    Raises:
        SettingsError: A tokenizer is damaged.
    """
    files = [folder / "tokenizer.json" for folder in (directory, other)]
    if not all(file.is_file() for file in files):
        return True
    ours, theirs = (
        {token_id: token for token, token_id in parse_tokenizer(file.read_bytes(), str(file)).get_vocab().items()}
        for file in files
    )
    return all(theirs.get(token_id, token) == token for token_id, token in ours.items())


def vocabulary_size_of(tokenizer: "LitGPTTokenizer") -> int:
    """Return the same for LitGPT's tokenizer, of either library.

    Raises:
        SettingsError: The highest id is so large that no model has an embedding for it.
    """
    processor: Any = tokenizer.processor
    return vocabulary_size(processor) if tokenizer.backend == "huggingface" else tokenizer.vocab_size


def special_token(files: Mapping[str, bytes], kind: Literal["eos", "bos"], directory: Path) -> int:
    """Return the id of the token that ends documents, or of the one that begins them.

    Looks where LitGPT looks: `<kind>_token` in `tokenizer_config.json`, then `<kind>_token_id` in
    `generation_config.json`.

    Args:
        files: Those of the tokenizer, as from `litgpt_moe_ext.data.tokenizer.files.read_tokenizer`.
        kind: Which.
        directory: Where they are from, for error messages.

    Raises:
        SettingsError: No file names the token, or it is not in the vocabulary.
    """
    tokenizer = parse_tokenizer(files["tokenizer.json"], str(directory / "tokenizer.json"))
    config_path = directory / "tokenizer_config.json"
    token = _content(_json(files, config_path).get(f"{kind}_token"))
    if token is not None:
        try:
            token_id = tokenizer.token_to_id(token)
        except (TypeError, UnicodeEncodeError):  # no text, or half of a surrogate pair, written as an escape
            token_id = None
        if token_id is None:
            raise SettingsError(
                f"{config_path} names {kind}_token {token!r}, which is not in the vocabulary of tokenizer.json; "
                "name a token of the vocabulary"
            )
        return token_id
    token_id = _json(files, directory / "generation_config.json").get(f"{kind}_token_id")
    if isinstance(token_id, list):
        token_id = token_id[0] if token_id else None
    if token_id is None:
        name, consequence = _CONSEQUENCES[kind]
        raise SettingsError(
            f"tokenizer_dir: {quoted(directory)} has no {name} token, so {consequence}; add "
            f'"{kind}_token": "<a token of the vocabulary>" (and "tokenizer_class": "PreTrainedTokenizerFast") to '
            f"{config_path}"
        )
    if type(token_id) is not int or not 0 <= token_id < 2**32 or tokenizer.id_to_token(token_id) is None:
        raise SettingsError(
            f"{directory / 'generation_config.json'} names {kind}_token_id {token_id!r}, outside the "
            "vocabulary; name an id of the vocabulary"
        )
    return token_id


def check_tokenizer(files: Mapping[str, bytes], directory: Path, needs_bos: bool = False) -> int:
    """Return the id of the token that ends documents, if LitGPT can open the tokenizer, and it has what is needed.

    Args:
        files: Those of the tokenizer.
        directory: Where they are from, for error messages.
        needs_bos: Whether a token that begins documents is needed.

    Raises:
        SettingsError: It has no such token, or LitGPT could not open it.
    """
    path = directory / "tokenizer_config.json"
    config, eos_id = _json(files, path), special_token(files, "eos", directory)
    if needs_bos or config.get("bos_token") is not None:
        special_token(files, "bos", directory)
    if path.name in files and not isinstance(config.get("tokenizer_class"), str):
        raise SettingsError(
            f'tokenizer_dir: {path} names no tokenizer class, which LitGPT needs; add "tokenizer_class": '
            '"PreTrainedTokenizerFast" to it'
        )
    return eos_id


def _content(token: Any) -> Any:
    # As tokenizer_config.json names a token: by its text, or with how it is matched.
    return token.get("content") if isinstance(token, dict) else token


def _json(files: Mapping[str, bytes], path: Path) -> dict:
    if path.name not in files:
        return {}
    try:
        content = json.loads(files[path.name].decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: also at an integer of thousands of digits
        raise SettingsError(f"{path} is not valid JSON ({error}); repair or replace the file") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds {type(content).__name__}, not an object; repair or replace the file")
    return content
