"""The tensors of a Hugging Face directory, read one at a time, in any supported storage format."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.hf.published.quantized import Quantization, from_fp8, from_mxfp4
from litgpt_moe_ext.export.hf.shards import INDEX_FILE
from litgpt_moe_ext.wording import quoted

# Tensors that transformers recomputes, or that only old versions stored.
_IGNORED = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_GATE, _UP = ("gate_proj", "w1"), ("up_proj", "w3")
# The embedding is stored once if it is also the output head. In models saved without an output head, as GPT-2 was by
# OpenAI, names lack the prefix.
_EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight")
_FLOATING = ("F64", "F32", "F16", "BF16")


class StoredWeights:
    """The tensors of a directory's safetensors files, by their names with experts stored one by one.

    Experts may be stored one by one (`experts.3.gate_proj.weight`) or stacked, as in the memory of transformers 5
    (`experts.gate_up_proj`). Quantized tensors come with their scales: `W_blocks` and `W_scales` for W in MXFP4,
    `W_scale_inv` and W in FP8.
    """

    def __init__(self, hf_dir: Path, quantization: Quantization, tied: bool) -> None:
        """Open the files.

        Args:
            hf_dir: The directory.
            quantization: How weights are stored.
            tied: Whether the output head is the embedding.

        Raises:
            SettingsError: If a file is missing or damaged.
        """
        self._quantization = quantization
        # File and stored name of each tensor, by the name with an output head.
        self._stored: dict[str, tuple[Any, str]] = {}
        for path in _files(hf_dir):
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise SettingsError(f"hf_dir: {quoted(path)} cannot be read ({error}); copy it again") from error
            names = file.keys()
            self._stored |= {name: (file, name) for name in names}
        for prefix, table in (name.split(".", 1) for name in _EMBEDDINGS):
            if table in self._stored:
                self._stored = {f"{prefix}.{name}": place for name, place in self._stored.items()}
        tables = [name for name in _EMBEDDINGS if tied and name in self._stored]
        self._alias = {"lm_head.weight": tables[0]} if tables and "lm_head.weight" not in self._stored else {}
        # Two stored tables of a tied model, of which transformers would read only one.
        self._same = ["lm_head.weight", *tables] if tables and not self._alias else []

    def require(self, wanted: Mapping[str, tuple[int, ...]], optional: re.Pattern[str]) -> list[str]:
        """Check that exactly the wanted tensors are stored; return the optional ones that are stored as well.

        Args:
            wanted: Shapes by name.
            optional: Names that may be stored too, and are left out.

        Raises:
            SettingsError: If tensors are missing, surplus, of another shape, or quantized without scales.
        """
        parts_of = {name: self._parts(name) for name in wanted}
        used = {part for parts in parts_of.values() for part in parts}
        missing = [name for name, parts in parts_of.items() if not parts]
        unused = [name for name in self._stored if name not in used and not _IGNORED.search(name)]
        left_out = [name for name in unused if optional.match(name)]
        # Biases of the class that the model does not use are zeros.
        surplus = [name for name in unused if name not in left_out and not self._is_zero(name)]
        if missing or surplus:
            raise SettingsError(
                f"hf_dir: the weights are not those of its config.json: missing {missing[:4]}, surplus {surplus[:4]}"
            )
        for name, parts in parts_of.items():
            if len(parts) == 1 and (kind := self._type(parts[0])) not in _FLOATING:
                raise SettingsError(f"hf_dir: {parts[0]} is stored as {kind}, and its config.json does not say how")
            if (shape := self._shape_of(name, parts)) != wanted[name]:
                raise SettingsError(f"hf_dir: {name} is {shape}; must be {wanted[name]} for the sizes in config.json")
        if self._same and not torch.equal(*map(self._tensor, self._same)):
            raise SettingsError(
                f"hf_dir: its config.json says tie_word_embeddings: true, and {' and '.join(self._same)} differ; say "
                "false there if both belong to the model, or else remove the first"
            )
        return left_out

    def nbytes(self) -> int:
        """Return about how many bytes the tensors take once dequantized."""
        blocks_to_bfloat16 = 4
        return sum(
            math.prod(self._shape(name)) * {"F64": 8, "F32": 4, "U8": blocks_to_bfloat16}.get(self._type(name), 2)
            for name in self._stored
        )

    def get(self, name: str) -> Tensor:
        """Return a stored tensor as floating-point numbers."""
        first, *scales = self._parts(name)
        if len(scales) == 0 and first in (name, self._alias.get(name)):
            return self._tensor(first)
        if len(scales) == 0:
            expert, part = _expert_of(name)
            stacked = self._slice(first)[expert]
            return stacked.chunk(2)[int(part in _UP)] if part in _GATE + _UP else stacked
        (scale,) = scales
        if self._quantization.method == "mxfp4":
            return self._from_mxfp4(first, scale)
        return from_fp8(first, self._tensor(first), self._tensor(scale), self._quantization)

    def _from_mxfp4(self, blocks: str, scales: str) -> Tensor:
        # Expert by expert, because looking up codes takes many times the memory of the result.
        n_expert, rows, groups, size = self._shape(blocks)
        codes, exponents = self._slice(blocks), self._slice(scales)
        weights = torch.empty(n_expert, rows, groups * size * 2, dtype=torch.bfloat16)
        for expert in range(n_expert):
            weights[expert] = from_mxfp4(codes[expert], exponents[expert])
        return weights.mT

    def _parts(self, name: str) -> list[str]:
        name = self._alias.get(name, name)
        method = self._quantization.method
        if name in self._stored:
            scale = f"{name}_scale_inv"
            return [name, scale] if method == "fp8" and scale in self._stored else [name]
        if method == "mxfp4" and f"{name}_blocks" in self._stored:
            return [f"{name}_blocks", f"{name}_scales"]
        if not _EXPERT.search(name):
            return []
        prefix = name[: name.index(".experts.") + 9]
        _, part = _expert_of(name)
        stacked = "gate_up_proj" if part in _GATE + _UP else "down_proj"
        candidates = [prefix + stacked, prefix.replace("block_sparse_moe", "mlp") + stacked]
        return [c for c in candidates if c in self._stored][:1]

    def _shape_of(self, name: str, parts: list[str]) -> tuple[int, ...]:
        shape = tuple(self._shape(parts[0]))
        if parts[0].endswith("_blocks"):
            n_expert, rows, groups, size = shape
            return n_expert, groups * size * 2, rows
        if not _EXPERT.search(name) or parts[0] == name:
            return shape
        _, rows, *rest = shape
        return (rows // 2 if _expert_of(name)[1] in _GATE + _UP else rows, *rest)

    def _is_zero(self, name: str) -> bool:
        return not self._tensor(name).float().any()

    def _tensor(self, name: str) -> Tensor:
        file, theirs = self._stored[name]
        return file.get_tensor(theirs)

    def _slice(self, name: str) -> Any:
        file, theirs = self._stored[name]
        return file.get_slice(theirs)

    def _type(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def _shape(self, name: str) -> list[int]:
        return self._slice(name).get_shape()


def _files(hf_dir: Path) -> list[Path]:
    index, whole = hf_dir / INDEX_FILE, hf_dir / "model.safetensors"
    if whole.is_file():  # wins over an index that may be left from before
        return [whole]
    if not index.is_file():
        raise SettingsError(
            f"hf_dir: {quoted(hf_dir)} has neither {whole.name} nor {INDEX_FILE}; open it with transformers and "
            "save_pretrained() it"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [hf_dir / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"hf_dir: {quoted(index)} cannot be read ({error}); copy it again") from error
    for name, path in zip(names, paths, strict=True):
        # The hub's cache has links.
        if path.resolve().parent != hf_dir.resolve() and not path.is_symlink():
            raise SettingsError(f"hf_dir: {INDEX_FILE} names {name!r}, which is outside the directory")
    return paths


def _expert_of(name: str) -> tuple[int, str]:
    number, part, _ = name[name.index(".experts.") + 9 :].split(".")
    return int(number), part
