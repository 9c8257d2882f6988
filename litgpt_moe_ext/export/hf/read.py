"""From a Hugging Face checkpoint to a LitGPT checkpoint with this package's layers."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import litgpt
import torch
from litgpt.utils import incremental_save, save_config
from safetensors import safe_open
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.directory import new_directory, require_absent
from litgpt_moe_ext.export.hf.architectures import ARCHITECTURES
from litgpt_moe_ext.export.hf.facts import facts_of
from litgpt_moe_ext.export.hf.settings import model_settings
from litgpt_moe_ext.export.hf.shards import INDEX_FILE
from litgpt_moe_ext.export.hf.tensors import Constant

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# What transformers recomputes, or keeps from versions that stored it.
_IGNORED = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


def import_checkpoint(hf_dir: Path, out_dir: Path) -> "Config":
    """Write a Hugging Face checkpoint as a LitGPT checkpoint.

    Args:
        hf_dir: A directory with `config.json` and safetensors.
        out_dir: The new directory; it appears when everything in it is written.

    Returns:
        The model's configuration.

    Raises:
        SettingsError: If the architecture is unknown, if tensors are missing or surplus, or if `out_dir` exists.
    """
    require_absent(out_dir)
    model_type, settings = model_settings(hf_dir)
    config = cast("Config", litgpt.Config(**settings))
    (architecture,) = (a for a in ARCHITECTURES if a.model_type == model_type)
    facts = facts_of(config, {})
    weights = _Weights(hf_dir)
    entries = architecture.entries(facts)
    wanted = [name for e in entries if not isinstance(e, Constant) for name in e.names(config.n_expert)]
    weights.require(wanted)

    with new_directory(out_dir) as partial:
        with incremental_save(partial / "lit_model.pth") as saver:
            state = {}
            for entry in entries:
                if not isinstance(entry, Constant):
                    tensor = entry.back(weights.get, config.n_expert)
                    state[entry.ours] = saver.store_early(tensor.contiguous().clone())
            state |= {name: saver.store_early(t) for name, t in _left_at_zero(config, set(state)).items()}
            saver.save(state)
        save_config(config, partial)
        for name in _TOKENIZER:
            if (hf_dir / name).is_file():
                shutil.copyfile(hf_dir / name, partial / name)
    return config


def _left_at_zero(config: "Config", present: set[str]) -> dict[str, Tensor]:
    """Return the balancing biases that the model has here and the class has not."""
    with torch.device("meta"):
        expected = litgpt.GPT(config).state_dict()
    missing = {name: tensor for name, tensor in expected.items() if name not in present}
    assert all(name.endswith("e_score_correction_bias") for name in missing), sorted(missing)
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in missing.items()}


class _Weights:
    """The tensors of a directory's safetensors files, read one at a time.

    Experts may be stored one by one (`experts.3.gate_proj.weight`) or stacked, as transformers 5 has them in memory
    (`experts.gate_up_proj`).
    """

    def __init__(self, hf_dir: Path) -> None:
        index = hf_dir / INDEX_FILE
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        self._place = {}
        for name in files:
            path = hf_dir / name
            if path.resolve().parent != hf_dir.resolve() and not path.is_symlink():
                raise SettingsError(f"hf_dir: {INDEX_FILE} names {name!r}, which is outside the directory")
            try:
                file = safe_open(path, "pt")
            except Exception as error:  # the library raises nothing more precise
                raise SettingsError(f"hf_dir: {str(path)!r} cannot be read ({error}); copy it again") from error
            self._place |= dict.fromkeys(file.keys(), file)
        # An embedding that is also the output head is stored once.
        tables = [name for name in ("model.embed_tokens.weight", "transformer.wte.weight") if name in self._place]
        self._alias = {"lm_head.weight": tables[0]} if tables and "lm_head.weight" not in self._place else {}

    def require(self, wanted: list[str]) -> None:
        """Raise SettingsError unless these are all tensors there are."""
        used = {place for name in wanted for place in self._stored(name)}
        missing = [name for name in wanted if not self._stored(name)]
        surplus = [name for name in self._place if name not in used and not _IGNORED.search(name)]
        # Biases that a class has and the model does not use.
        surplus = [name for name in surplus if self._place[name].get_tensor(name).any()]
        if missing or surplus:
            raise SettingsError(
                f"hf_dir: the weights are not those of its config.json: missing {missing[:4]}, surplus {surplus[:4]}"
            )

    def get(self, name: str) -> Tensor:
        """Return a tensor by the name that it has with experts stored one by one."""
        (stored,) = self._stored(name)
        tensor = self._place[stored].get_tensor(stored) if stored == name or name in self._alias else None
        if tensor is not None:
            return tensor
        expert, part = _expert_of(name)
        whole = self._place[stored].get_slice(stored)[expert]
        if part in ("gate_proj", "up_proj", "w1", "w3"):
            return whole.chunk(2)[0 if part in ("gate_proj", "w1") else 1]
        return whole

    def _stored(self, name: str) -> list[str]:
        name = self._alias.get(name, name)
        if name in self._place:
            return [name]
        if not _EXPERT.search(name):
            return []
        prefix = name[: name.index(".experts.") + 9]
        _, part = _expert_of(name)
        stacked = "gate_up_proj" if part in ("gate_proj", "up_proj", "w1", "w3") else "down_proj"
        candidates = [prefix + stacked, prefix.replace("block_sparse_moe", "mlp") + stacked]
        return [c for c in candidates if c in self._place][:1]


def _expert_of(name: str) -> tuple[int, str]:
    number, part, _ = name[name.index(".experts.") + 9 :].split(".")
    return int(number), part
