"""From a LitGPT checkpoint to a directory that transformers opens."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import litgpt
import torch
from torch import Tensor

from litgpt_moe_ext.durable import flush, flush_tree
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import CONFIG_FILE, WEIGHTS_FILE, parse_dtype, read_checkpoint
from litgpt_moe_ext.export.hf.architectures import REMOTE_CODE, Architecture, choose
from litgpt_moe_ext.export.hf.card import model_card
from litgpt_moe_ext.export.hf.facts import Facts, facts_of
from litgpt_moe_ext.export.hf.shards import MAX_SHARD_BYTES, Sketch, write_shards
from litgpt_moe_ext.export.hf.tensors import Constant
from litgpt_moe_ext.export.hf.tokenizer import export_tokenizer

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# Only training uses these; the exported model computes the same without them.
_TRAINING_ONLY = ("gate.noise_weight", "gate.bias_updates")
_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        class_name: The class of transformers, or of the file beside the weights.
        rejected: What each class that was tried before lacks.
        n_bytes: Size of the weights.
    """

    class_name: str
    rejected: dict[str, list[str]]
    n_bytes: int


def export_checkpoint(
    checkpoint_dir: Path, out_dir: Path, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Export:
    """Write a checkpoint for transformers.

    Args:
        checkpoint_dir: A LitGPT checkpoint of any strategy; a training checkpoint's optimizer is left out.
        out_dir: The new directory; it appears when everything in it is written.
        dtype: Floating type of the weights; None keeps theirs. Balancing biases stay float32.
        max_shard_bytes: Most bytes in a file.

    Raises:
        SettingsError: If there is no whole checkpoint, if `out_dir` exists, or if the model cannot be exported.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (checkpoint_dir / name).is_file():
            raise SettingsError(f"checkpoint_dir: {str(checkpoint_dir)!r} has no {name}; name a whole checkpoint")
    if out_dir.exists():
        raise SettingsError(f"out_dir: {str(out_dir)!r} exists; name a new directory")
    config = _read_config(checkpoint_dir)
    content = read_checkpoint(checkpoint_dir / WEIGHTS_FILE)
    state = _weights(content.get("model", content))
    facts = facts_of(config, state)
    architecture, rejected = choose(facts)
    entries = architecture.entries(facts)
    _require_all(entries, state)

    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    _require_space(out_dir, state, dtype)
    partial.mkdir(parents=True)
    try:
        chosen = parse_dtype(dtype)
        sketches = [_sketch(name, tensor, chosen) for name, tensor in _tensors(entries, _on_meta(state))]
        n_bytes = write_shards(sketches, _tensors(entries, state), partial, max_shard_bytes)
        ids = export_tokenizer(checkpoint_dir, partial, config.padded_vocab_size)
        _write_json(partial / "config.json", _config_json(architecture, facts, ids, chosen or _main_dtype(state)))
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **ids})
        if architecture.model_type == "litgpt_moe":
            shutil.copyfile(Path(__file__).with_name(f"{REMOTE_CODE}.py"), partial / f"{REMOTE_CODE}.py")
        card = model_card(checkpoint_dir, config, architecture.class_name)
        (partial / "README.md").write_text(card, encoding="utf-8")
        flush_tree(partial)
        os.rename(partial, out_dir)
        flush(out_dir.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Export(architecture.class_name, rejected, n_bytes)


def _read_config(checkpoint_dir: Path) -> "Config":
    try:
        return cast("Config", litgpt.Config.from_file(checkpoint_dir / CONFIG_FILE))
    except TypeError as error:
        # A field that this version does not know.
        raise SettingsError(
            f"checkpoint_dir: {str(checkpoint_dir / CONFIG_FILE)!r} was written by a newer version ({error}); upgrade"
        ) from error


def _weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from litgpt_moe_ext.moe.expert_layouts import stack_experts

    kept = {name: tensor for name, tensor in state.items() if not name.endswith(_TRAINING_ONLY)}
    prefixes = {name[: name.index(".experts.") + 9] for name in kept if ".experts.0." in name}
    for prefix in prefixes:
        count = len({name[len(prefix) :].split(".")[0] for name in kept if name.startswith(prefix)})
        stack_experts(kept, prefix, count)
    return kept


def _require_all(entries: list, state: dict[str, Tensor]) -> None:
    ours = {entry.ours for entry in entries if not isinstance(entry, Constant)}
    missing = sorted(ours - set(state))
    surplus = sorted(name for name in set(state) - ours if not name.endswith(_BIAS))
    if missing or surplus:
        raise SettingsError(
            f"checkpoint_dir: its weights are not those of its {CONFIG_FILE}: missing {missing[:5]}, "
            f"surplus {surplus[:5]}; name a whole checkpoint"
        )


def _require_space(out_dir: Path, state: dict[str, Tensor], dtype: str | None) -> None:
    parent = out_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    chosen = parse_dtype(dtype)
    needed = sum(t.numel() * (chosen or t.dtype).itemsize for t in state.values())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise SettingsError(
            f"out_dir: {str(out_dir)!r} needs {needed / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB left; free "
            "some space, or choose a smaller --dtype"
        )


def _on_meta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in state.items()}


def _tensors(entries: list, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        if isinstance(entry, Constant):
            yield entry.name, entry.make()
            continue
        tensor = state[entry.ours]
        if entry.ours.endswith(_BIAS) and not tensor.is_meta:
            # transformers 4 masks the groups that were not chosen with 0, which would win against negative biased
            # scores. The same number on all biases changes no choice.
            tensor = tensor - tensor.min().clamp(max=0)
        yield from entry.out(tensor)


def _sketch(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Sketch:
    keeps = dtype is None or _BIAS in name or not tensor.is_floating_point()
    return Sketch(name, tuple(tensor.shape), tensor.dtype if keeps else dtype)


def _main_dtype(state: dict[str, Tensor]) -> torch.dtype:
    return state["lm_head.weight"].dtype


def _config_json(architecture: Architecture, facts: Facts, ids: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        **architecture.config(facts),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **ids,
        # transformers 4 reads the first name, 5 the second.
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "initializer_range": 0.02,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
