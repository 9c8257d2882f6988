"""From a Hugging Face checkpoint to a LitGPT checkpoint with this package's layers."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import litgpt
import torch
from torch import Tensor

from litgpt_moe_ext.config.litgpt_fields import check_ranges
from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.export.architecture import Architecture
from litgpt_moe_ext.export.directory import new_directory, require_absent
from litgpt_moe_ext.export.facts import facts_of
from litgpt_moe_ext.export.hf.architectures import ARCHITECTURES
from litgpt_moe_ext.export.hf.config_json import OWN_SETTINGS
from litgpt_moe_ext.export.hf.published.config import Published, read_published
from litgpt_moe_ext.export.hf.published.stored import StoredWeights
from litgpt_moe_ext.export.litgpt_checkpoint import write_checkpoint
from litgpt_moe_ext.export.source import TRAINING_ONLY
from litgpt_moe_ext.export.tensors import BALANCING_BIAS
from litgpt_moe_ext.meta.models import meta_model

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        config: The model's configuration.
        tied: Whether the output head is the token embedding there; here each has a table of its own.
        dequantized: `mxfp4` or `fp8` if weights were stored so, else `none`.
        left_out: Names of tensors for multi-token prediction, which no model here has.
    """

    config: "Config"
    tied: bool
    dequantized: str
    left_out: list[str]


def import_checkpoint(hf_dir: Path, out_dir: Path) -> Imported:
    """Write a Hugging Face checkpoint as a LitGPT checkpoint.

    Args:
        hf_dir: A directory with `config.json` and safetensors.
        out_dir: The new directory; it appears only once everything in it is written.

    Raises:
        SettingsError: If the architecture is unknown, if tensors are missing, surplus or of another shape than
            `config.json` says, or if `out_dir` exists.
    """
    require_absent(out_dir)
    published = read_published(hf_dir)
    try:
        check_ranges(published.settings)
        config = cast("Config", litgpt.Config(**published.settings))
    except (TypeError, ValueError, AssertionError) as error:  # how LitGPT and this package judge fields and values
        raise SettingsError(
            f"hf_dir: its config.json describes no model that this package computes: {one_line(error)}; copy it again"
        ) from error
    if config.rope_n_elem % 2:
        raise SettingsError(
            f"hf_dir: head_dim: {config.head_size}, of which {config.rope_n_elem} elements are rotated in pairs, must "
            "have an even number of them; copy config.json again"
        )
    architecture = _architecture(published, config)
    if published.settings.get("rope_interleave") is False:
        # DeepSeek-V3 may be stored this way; our exports never are.
        architecture = replace(architecture, rotates_neighbours=False)
    expected = meta_model(config).state_dict()
    rules = architecture.rules(config, [name for name in expected if not name.endswith(TRAINING_ONLY)])
    weights = StoredWeights(hf_dir, published.quantization, published.tied)
    wanted = {name: tuple(part.shape) for ours, stored in rules.items() for name, part in stored.out(expected[ours])}
    left_out = weights.require(wanted, published.left_out)

    with new_directory(out_dir, weights.nbytes()) as partial:
        stored_there = ((ours, stored.back(weights.get, config.n_expert)) for ours, stored in rules.items())
        write_checkpoint(partial, config, chain(stored_there, _only_here(expected, rules.keys())), hf_dir)
        if not (partial / _GENERATION).is_file():
            _say_ends(hf_dir / "config.json", partial / _GENERATION, config.padded_vocab_size)
        _name_class(partial / "tokenizer_config.json")
    return Imported(config, published.tied, published.quantization.method, left_out)


def _architecture(published: Published, config: "Config") -> Architecture:
    several = [architecture for architecture in ARCHITECTURES if architecture.model_type == published.model_type]
    if published.model_type != "litgpt_moe":
        (architecture,) = several
        return architecture
    # Our own class: its entries must agree with the fields of `litgpt.Config` that it also holds.
    facts = facts_of(config, {})
    architecture = next(architecture for architecture in several if not architecture.lacks(facts))
    for name, value in json.loads(json.dumps(architecture.config(facts))).items():
        if name != "auto_map" and name in published.entries and published.entries[name] != value:
            raise SettingsError(
                f"hf_dir: {name}: {published.entries[name]!r} must be {value!r}, as {OWN_SETTINGS} has it; copy "
                "config.json again"
            )
    return architecture


def _name_class(file: Path) -> None:
    # LitGPT opens no tokenizer whose file names no class; GPT-2's names none.
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or malformed, which its reader will report
        return
    if isinstance(settings, dict) and "tokenizer_class" not in settings:
        named = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
        file.write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say_ends(described: Path, file: Path, vocab_size: int) -> None:
    # As in transformers, the model's configuration fills in what its generation configuration lacks.
    settings = json.loads(described.read_text(encoding="utf-8"))
    ids = {}
    for name in ("bos_token_id", "eos_token_id"):
        value = settings.get(name)
        several = value if isinstance(value, list) else [value]
        if several and all(type(token) is int and 0 <= token < vocab_size for token in several):
            ids[name] = value
    if ids:
        file.write_text(json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n", encoding="utf-8")


def _only_here(expected: Mapping[str, Tensor], found: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(expected.keys() - found):
        # Routers here have a balancing bias whether the class has one or not, and training state starts at 0.
        assert name.endswith((BALANCING_BIAS, *TRAINING_ONLY)), name
        yield name, torch.zeros_like(expected[name], device="cpu")
