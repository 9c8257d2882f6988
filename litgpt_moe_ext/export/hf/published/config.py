"""A Hugging Face `config.json`: reading and checking its description of a model."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.config.features import family_of_norms
from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.export.hf.published.names import by_names_of_readers
from litgpt_moe_ext.export.hf.published.quantized import Quantization, quantization_of
from litgpt_moe_ext.export.hf.published.settings import READERS
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
            f"hf_dir: {quoted(path)} cannot be read ({reason}); name a Hugging Face checkpoint"
        ) from error
    if not isinstance(model_type, str) or model_type not in READERS:
        raise SettingsError(
            f"hf_dir: {quoted(path)} is a {model_type}; known architectures: {', '.join(sorted(READERS))}"
        )
    raw = by_names_of_readers(model_type, entries)
    quantization = quantization_of(raw)
    from transformers import CONFIG_MAPPING

    # Before the file is judged: an installation of transformers that does not load is not its fault.
    classes = [CONFIG_MAPPING[model_type]] if model_type in CONFIG_MAPPING else []
    try:
        whole = _with_defaults(raw, _defaults(raw, *classes) if classes else {})
        settings = READERS[model_type](whole)
        n_layer = raw.get("num_hidden_layers") or 0
        beyond = "|".join(str(n_layer + i) for i in range(raw.get("num_nextn_predict_layers") or 0))
    except SettingsError:
        raise
    except KeyError as error:
        raise SettingsError(f"hf_dir: {quoted(path)} does not say {error}; name a whole checkpoint") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # of values of another type
        raise SettingsError(f"hf_dir: {quoted(path)} is damaged ({one_line(error)}); copy it again") from error
    left_out = re.compile(rf"model\.(?:mtp_|layers\.(?:{beyond})\.)")
    name = _name_of(hf_dir)
    norm = settings.get("norm_class_name")
    if isinstance(norm, str) and (family := family_of_norms(norm, name)):
        # LitGPT would give the model this family's norms because of the name.
        name = name.replace(family, family.lower())
    tied = bool(whole.get("tie_word_embeddings", True))
    return Published(model_type, settings | {"name": name}, quantization, tied, entries, left_out)


def _name_of(hf_dir: Path) -> str:
    folder = hf_dir.resolve()
    # The hub's cache has a folder for each commit: models--OWNER--NAME/snapshots/COMMIT.
    return folder.name if folder.parent.name != "snapshots" else folder.parents[1].name.rpartition("--")[2]


def _defaults(raw: _Json, published_class: "type[PretrainedConfig]") -> _Json:
    # Some follow from sizes, such as Llama's head size.
    sizes = {key: raw[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads") if key in raw}
    try:
        defaults = published_class(**sizes).to_dict()
    except Exception:  # transformers 5 has one of its own; what is wrong is said of the field that the size becomes
        defaults = published_class().to_dict()
    # The classes of transformers 5 gather everything about rotary positions under one key, and so do its files.
    if rope := dict(defaults.pop("rope_parameters", None) or {}):
        defaults |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        defaults["rope_scaling"] = rope
    return defaults


def _with_defaults(raw: _Json, defaults: _Json) -> _Json:
    # Missing entries have the defaults of the class in transformers.
    hf = defaults | raw
    rope = raw.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise SettingsError(f"hf_dir: rope_scaling: {rope!r} must be settings by name; copy config.json again")
    rope = dict(rope)
    hf["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", defaults.get("rope_theta", 10000.0)))
    hf["partial_rotary_factor"] = rope.pop(
        "partial_rotary_factor", raw.get("partial_rotary_factor", defaults.get("partial_rotary_factor", 1.0))
    )
    hf["rope"] = rope
    return hf
