"""A SentencePiece model as metadata of a GGUF file.

llama.cpp merges neighbours by the scores of the merged pieces. SentencePiece's BPE does the same if its only change to
a text is to the spaces, and if it falls back to bytes for unknown text.
"""

from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import quoted

Piece = tuple[int, str, int]
"""Id, text, and kind; SentencePiece and llama.cpp number the kinds alike."""
_BPE = 2
_USER_DEFINED, _UNUSED = 4, 5


def read(checkpoint_dir: Path, vocab_size: int) -> tuple[list[Piece], dict[str, Any]]:
    """Return the vocabulary of a `tokenizer.model`, and keys under `tokenizer.`.

    Args:
        checkpoint_dir: Where it is.
        vocab_size: Number of tokens in the file, including those without a piece.

    Raises:
        SettingsError: If llama.cpp would split texts differently.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyrefly: ignore[missing-attribute] (made when it is imported)
    model.ParseFromString((checkpoint_dir / "tokenizer.model").read_bytes())
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    kinds = {piece.type for piece in model.pieces}
    obstacles = {
        "not BPE": trainer.model_type != _BPE,
        "without byte_fallback": not trainer.byte_fallback,
        f"normalization {normalizer.name}": bool(normalizer.precompiled_charsmap),
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "without escape_whitespaces": not normalizer.escape_whitespaces,
        "spaces as suffixes": trainer.treat_whitespace_as_suffix,
        "user-defined or unused pieces": bool(kinds & {_USER_DEFINED, _UNUSED}),
    }
    if found := [name for name, present in obstacles.items() if present]:
        raise SettingsError(
            f"checkpoint_dir: the tokenizer.model in {quoted(checkpoint_dir)} ({', '.join(found)}) must be a BPE with "
            "byte_fallback that normalizes nothing, as Llama's, for a GGUF file; export with --format hf"
        )
    pieces = [(i, piece.piece, piece.type) for i, piece in enumerate(model.pieces)]
    return pieces, {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": [piece.score for piece in model.pieces] + [0.0] * (vocab_size - len(pieces)),
        "ggml.add_space_prefix": normalizer.add_dummy_prefix,
        "ggml.unknown_token_id": trainer.unk_id,
    }
