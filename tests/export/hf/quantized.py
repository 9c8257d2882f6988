"""Checkpoints in the forms in which large models are published, of random numbers."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GPT_OSS_FOR_MXFP4 = {"n_embd": 64, "moe_intermediate_size": 32}


def to_mxfp4(hf_dir: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Put random blocks and scales in the place of a GPT-OSS model's experts, and return them by name."""
    file = hf_dir / "model.safetensors"
    state, made = load_file(file), {}
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_expert, columns, rows = state.pop(name).shape
        blocks = torch.randint(256, (n_expert, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 127, blocks.shape[:-1], dtype=torch.uint8)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        made[name] = blocks, scales
    save_file(state, file)
    change_json(hf_dir, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return made


def to_fp8(hf_dir: Path, block: tuple[int, int]) -> None:
    """Store the linear maps of a DeepSeek-V3 model in FP8 with a scale per block."""
    file = hf_dir / "model.safetensors"
    state = load_file(file)
    for name in [name for name in state if name.endswith("_proj.weight") or "_proj_with_mqa" in name]:
        weight = state[name]
        height, width = block
        rows, columns = (-(-n // size) for n, size in zip(weight.shape, block, strict=True))
        state[name], scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for i in range(rows):
            for j in range(columns):
                place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scales[i, j] = weight[place].abs().max() / 448
                state[name][place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scales
    save_file(state, file)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    change_json(hf_dir, quantization_config=settings)


def change_json(hf_dir: Path, **changes: object) -> None:
    """Change entries of a `config.json`, or remove them where None is given."""
    file = hf_dir / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(
        json.dumps({key: value for key, value in content.items() if key not in changes or value is not None})
    )
