"""A Hugging Face `config.json`: reading and checking its description of a model."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe_ext.config.features import family_of_norms
from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.export.hf.published.names import by_names_of_readers
from litgpt_moe_ext.export.hf.published.quantized import Quantization, quantization_of
from litgpt_moe_ext.export.hf.published.settings import READERS

_Json = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """The content of a `config.json`.

    Attributes:
        model_type: The architecture.
        settings: Fields of a `litgpt.Config` that computes the same.
        quantization: How the weights are stored.
        tied: Whether the output head is the embedding.
        entries: All entries, unchanged.
        left_out: Names of tensors of layers for multi-token prediction, which the architecture in transformers ignores
            too.
    """

    model_type: str
    settings: _Json
    quantization: Quantization
    tied: bool
    entries: _Json
    left_out: re.Pattern[str]


def read_published(hf_dir: Path) -> Published:
    """Read the `config.json` of a checkpoint.

    Args:
        hf_dir: Its directory.

    Raises:
        SettingsError: If the architecture is unknown, or needs something that these layers do not compute.
    """
    path = hf_dir / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        model_type = entries["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise SettingsError(
            f"hf_dir: {str(path)!r} cannot be read ({reason}); name a Hugging Face checkpoint"
        ) from error
    if not isinstance(model_type, str) or model_type not in READERS:
        raise SettingsError(
            f"hf_dir: {str(path)!r} is a {model_type}; known architectures: {', '.join(sorted(READERS))}"
        )
    raw = by_names_of_readers(model_type, entries)
    quantization = quantization_of(raw)
    try:
        whole = _with_defaults(raw)
        settings = READERS[model_type](whole)
    except KeyError as error:
        raise SettingsError(f"hf_dir: {str(path)!r} does not say {error}; name a whole checkpoint") from error
    n_layer = raw.get("num_hidden_layers") or 0
    beyond = "|".join(str(n_layer + i) for i in range(raw.get("num_nextn_predict_layers") or 0))
    left_out = re.compile(rf"model\.(?:mtp_|layers\.(?:{beyond})\.)")
    name = hf_dir.resolve().name
    norm = settings.get("norm_class_name")
    if isinstance(norm, str) and (family := family_of_norms(norm, name)):
        # LitGPT would give the model this family's norms because of the name.
        name = name.replace(family, family.lower())
    tied = bool(whole.get("tie_word_embeddings", True))
    return Published(model_type, settings | {"name": name}, quantization, tied, entries, left_out)


def _with_defaults(raw: _Json) -> _Json:
    # Missing entries have the defaults of the class in transformers.
    from transformers import CONFIG_MAPPING

    defaults = CONFIG_MAPPING[raw["model_type"]]().to_dict() if raw["model_type"] in CONFIG_MAPPING else {}
    # Entries whose default is no number in the class, or that only published files have.
    _require_kinds(raw, defaults | dict.fromkeys(("n_group", "num_nextn_predict_layers"), 1))
    if defaults:
        # Some defaults follow from sizes, such as Llama's head size.
        sizes = {key: raw[key] for key in _SIZES if key in raw}
        defaults = CONFIG_MAPPING[raw["model_type"]](**sizes).to_dict()
    hf = defaults | raw
    # transformers 5 gathers everything about rotary positions under one key.
    rope = raw.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise SettingsError(f"hf_dir: rope_scaling: {rope!r} must be settings by name; copy config.json again")
    rope = dict(rope)
    hf["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", defaults.get("rope_theta", 10000.0)))
    hf["partial_rotary_factor"] = rope.pop(
        "partial_rotary_factor", raw.get("partial_rotary_factor", defaults.get("partial_rotary_factor", 1.0))
    )
    _require_kinds({key: hf[key] for key in ("rope_theta", "partial_rotary_factor")}, dict.fromkeys(hf, 1.0))
    hf["rope"] = rope
    return hf


# For the type of a default: the types that a value may have, and their description.
_KINDS: dict[type, tuple[type | tuple[type, ...], str]] = {
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
    list: (list, "a list"),
}
# Entries that every model needs, and those by which others are divided.
_NEEDED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("n_positions", "n_embd", "n_layer", "n_head"),
    *("layer_types", "decoder_sparse_step", "rope_theta", "partial_rotary_factor"),
)
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
# Numbers of layers or experts, over which code iterates, and their limit.
_COUNTED = (
    *("num_hidden_layers", "n_layer", "num_nextn_predict_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
)
_MOST = 10_000


def _require_kinds(raw: _Json, defaults: _Json) -> None:
    for key, value in raw.items():
        default = type(defaults.get(key))
        # Several tokens may end a text.
        if default not in _KINDS or key.endswith("_token_id") or (value is None and key not in _NEEDED):
            continue
        kind, words = _KINDS[default]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise SettingsError(f"hf_dir: {key}: {value!r} must be {words}; copy config.json again")
        # A GLM without rotation may be trained and exported here.
        if key in _NEEDED and value == 0 and key != "partial_rotary_factor":
            raise SettingsError(f"hf_dir: {key}: 0 must be more than 0; copy config.json again")
        if key in _COUNTED and not 0 <= value <= _MOST:
            raise SettingsError(f"hf_dir: {key}: {value} must be from 0 to {_MOST}; copy config.json again")
