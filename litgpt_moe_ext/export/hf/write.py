"""From a LitGPT checkpoint to a directory for transformers."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.evaluation.loading import parse_dtype
from litgpt_moe_ext.export.architecture import Architecture
from litgpt_moe_ext.export.card import write_card
from litgpt_moe_ext.export.directory import new_directory, require_absent
from litgpt_moe_ext.export.facts import Facts, facts_of, left_out
from litgpt_moe_ext.export.hf.architectures import choose_class
from litgpt_moe_ext.export.hf.config_json import REMOTE_CODE
from litgpt_moe_ext.export.hf.names import OWN_BALANCING_BIAS
from litgpt_moe_ext.export.hf.shards import MAX_SHARD_BYTES, write_shards
from litgpt_moe_ext.export.hf.tokenizer import export_tokenizer
from litgpt_moe_ext.export.source import read_source
from litgpt_moe_ext.export.tensors import BALANCING_BIAS


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        class_name: The class of transformers, or of the file next to the weights.
        serve: The command with which vLLM serves it.
        lines: For the user: what each class that was tried before lacks, the settings that the export leaves out, the
            command, and what was written.
    """

    class_name: str
    serve: str
    lines: list[str]


def export_checkpoint(
    checkpoint_dir: Path, out_dir: Path, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Export:
    """Write a checkpoint for transformers.

    Args:
        checkpoint_dir: A LitGPT checkpoint of any strategy; a training checkpoint's optimizer is left out.
        out_dir: The new directory; it appears only once everything in it is written.
        dtype: Floating type of the weights; None keeps theirs. Balancing biases stay float32.
        max_shard_bytes: Most bytes in a file.

    Raises:
        SettingsError: If there is no whole checkpoint, if `out_dir` exists, or if the model cannot be exported.
    """
    require_absent(out_dir)
    source = read_source(checkpoint_dir).with_own_experts()
    facts = facts_of(source.config, source.state)
    architecture, rejected = choose_class(facts)
    chosen = parse_dtype(dtype)
    with new_directory(out_dir, source.nbytes(chosen, architecture)) as partial:
        ids = export_tokenizer(checkpoint_dir, partial, source.config.padded_vocab_size)
        announced = {name: _converted(name, tensor, chosen) for name, tensor in source.tensors(architecture, meta=True)}
        n_bytes = write_shards(announced, source.tensors(architecture), partial, max_shard_bytes)
        config = _config_json(architecture, facts, ids, chosen or source.dtype)
        _write_json(partial / "config.json", config | {"tie_word_embeddings": source.writes_once(architecture)})
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **ids})
        if architecture.model_type == "litgpt_moe":
            shutil.copyfile(Path(__file__).with_name(f"{REMOTE_CODE}.py"), partial / f"{REMOTE_CODE}.py")
        write_card(partial, source, architecture, "hf", dtype, architecture.serve(facts, "PATH"))
    serve = architecture.serve(facts, str(out_dir))
    lines = [
        *(f"not {class_name}: {', '.join(lacking)}" for class_name, lacking in rejected.items()),
        *left_out(source.config),
        f"vLLM: {serve}",
        f"Wrote {out_dir} as {architecture.class_name}, {n_bytes / 1e6:,.1f} MB of weights",
    ]
    return Export(architecture.class_name, serve, lines)


def _converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    keeps = dtype is None or name.endswith((BALANCING_BIAS, OWN_BALANCING_BIAS))
    return tensor if keeps else tensor.to(dtype)


def _config_json(architecture: Architecture, facts: Facts, ids: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
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
