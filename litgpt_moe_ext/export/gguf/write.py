"""From a LitGPT checkpoint to a GGUF file."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import parse_dtype
from litgpt_moe_ext.export.architecture import Architecture, choose, nearest
from litgpt_moe_ext.export.card import write_card
from litgpt_moe_ext.export.directory import new_directory, require_absent
from litgpt_moe_ext.export.facts import Facts, facts_of, left_out
from litgpt_moe_ext.export.gguf.architectures import GRAPHS
from litgpt_moe_ext.export.gguf.tokenizer import tokenizer_metadata
from litgpt_moe_ext.export.source import Source, read_source

MODEL_FILE = "model.gguf"
# Numbers of llama.cpp's `LLAMA_FTYPE_*`, for tools that display a file's contents.
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
# Operands of additions and products in llama.cpp's graphs, and the routers, are float32.
_ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "position_embd.weight")


def export_gguf(checkpoint_dir: Path, out_dir: Path, dtype: str | None = None) -> list[str]:
    """Write a checkpoint as a file for llama.cpp and programs built on it.

    Args:
        checkpoint_dir: A LitGPT checkpoint of any strategy.
        out_dir: The new directory, with `model.gguf` in it.
        dtype: Floating type of the matrices; None keeps theirs. Vectors and routers are float32.

    Returns:
        Lines for the user: the settings that the export leaves out, and what was written.

    Raises:
        SettingsError: If no graph of llama.cpp computes this model, if there is no whole checkpoint, if `out_dir`
            exists, or if the package `gguf` is missing.
    """
    require_absent(out_dir)
    require_package()
    chosen = parse_dtype(dtype)
    source = read_source(checkpoint_dir).with_own_experts()
    facts = facts_of(source.config, source.state)
    graph = choose_graph(facts)
    tokenizer = tokenizer_metadata(checkpoint_dir, source.config.padded_vocab_size)
    file_type = _FILE_TYPES.get(chosen or source.dtype)
    if file_type is None:
        raise SettingsError(f"dtype: {dtype or source.dtype} must be float32, float16 or bfloat16 for a GGUF file")
    metadata = {
        "general.name": source.config.name or checkpoint_dir.resolve().parent.name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **{f"{graph.model_type}.{key}": value for key, value in graph.config(facts).items()},
        **{f"tokenizer.{key}": value for key, value in tokenizer.items()},
    }
    with new_directory(out_dir, source.nbytes(chosen, graph)) as partial:
        n_bytes = _write(partial / MODEL_FILE, source, graph, metadata, chosen)
        write_card(partial, source, graph, "gguf", dtype)
    written = f"Wrote {out_dir / MODEL_FILE} as {graph.class_name}, {n_bytes / 1e6:,.1f} MB of weights"
    return [*left_out(source.config), written]


def require_package() -> None:
    """Raise SettingsError if the package `gguf` is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise SettingsError("format: gguf needs the package gguf; install it with `pip install gguf`")


def choose_graph(facts: Facts) -> Architecture:
    """Return the first graph of llama.cpp that computes a model.

    Raises:
        SettingsError: If none does; the message says what the nearest ones lack.
    """
    graph, rejected = choose(facts, GRAPHS)
    if graph is None:
        raise SettingsError(
            f"format: gguf: no graph of llama.cpp computes this model ({nearest(rejected)}); export with "
            "--format hf, or train one that has a graph (docs/how-to/export.md)"
        )
    graph.config(facts)  # refuses numbers that the graph would misread
    return graph


def _write(path: Path, source: Source, graph: Architecture, metadata: dict[str, Any], dtype: torch.dtype | None) -> int:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, graph.model_type)
    for key, value in metadata.items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    raw_types = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    n_bytes, types = 0, {}
    for name, tensor in source.tensors(graph, meta=True):
        types[name] = _type_of(name, tensor, dtype or source.dtype)
        size = tensor.numel() * types[name].itemsize
        # The third argument is ignored if the last is given.
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, raw_types[types[name]])
        n_bytes += size
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in source.tensors(graph):
            writer.write_tensor_data(_as_numpy(tensor.to(types[name]).contiguous()))
    finally:
        writer.close()
    return n_bytes


def _type_of(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    vector = tensor.dim() == 1 or name.endswith(".bias")
    return torch.float32 if vector or name.endswith(_ALWAYS_FLOAT32) else dtype


def _as_numpy(tensor: Tensor) -> Any:
    # numpy has no bfloat16; the writer needs only the bytes.
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
