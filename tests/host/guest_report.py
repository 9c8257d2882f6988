"""Prints, as JSON, what LitGPT computes for models that name none of the plugin's classes. Run by `test_guest_rule`."""

import hashlib
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import litgpt.pretrain

# Of what the plugin postpones; see `test_lazy_imports`.
LOADED = sorted({"torchvision", "transformers", "scipy", "torch._dynamo"} & set(sys.modules))

import lightning as L  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from litgpt import GPT, Config  # noqa: E402
from litgpt.utils import save_config  # noqa: E402

from litgpt_moe_ext.host.autoload import _finder  # noqa: E402

SMALL = {"block_size": 32, "n_layer": 2, "padded_vocab_size": 64, "vocab_size": 64}
CONFIGS = {
    "pythia": ("pythia-14m", {"n_embd": 32, "n_head": 4, "head_size": None, "intermediate_size": 64}),
    "llama-3.2": (
        "Llama-3.2-1B",
        {"n_embd": 32, "n_head": 4, "n_query_groups": 2, "head_size": None, "intermediate_size": 64},
    ),
    "gemma-2": (
        "Gemma-2-2b",
        {
            "n_embd": 32,
            "n_head": 4,
            "n_query_groups": 2,
            "head_size": 8,
            "intermediate_size": 64,
            "sliding_window_size": 8,
        },
    ),
    "mixtral": (
        "Mixtral-8x7B-v0.1",
        {
            "n_embd": 32,
            "n_head": 4,
            "n_query_groups": 2,
            "intermediate_size": 48,
            "n_expert": 4,
            "n_expert_per_token": 2,
        },
    ),
    "yarn": (
        "Llama-3.2-1B",
        {
            "n_embd": 32,
            "n_head": 4,
            "n_query_groups": 2,
            "head_size": None,
            "intermediate_size": 64,
            "rope_adjustments": {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 8},
        },
    ),
    # The shape of DeepSeek-V3, which LitGPT 0.5.13 knows but has no name for.
    "deepseek-v3": (
        None,
        {
            "n_embd": 32,
            "n_head": 4,
            "norm_class_name": "RMSNorm",
            "bias": False,
            "parallel_residual": False,
            "rotary_percentage": 1.0,
            "mlp_class_name": "LLaMAMoE",
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_expert": 8,
            "n_expert_per_token": 2,
            "n_shared_expert": 1,
            "n_expert_groups": 4,
            "n_topk_groups": 2,
            "n_topk_scores_per_group": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "latent_attention": {
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
            },
        },
    ),
}


def digest(*tensors: torch.Tensor) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return hasher.hexdigest()[:16]


def report(name: str | None, changes: dict) -> dict[str, str]:
    config = Config.from_name(name, **SMALL, **changes) if name else Config(name="deepseek", **SMALL, **changes)
    fabric = L.Fabric(devices=1, accelerator="cpu")
    torch.manual_seed(1)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    litgpt.pretrain.initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    for module in model.modules():
        if type(module).__name__ == "GroupedTopkRouter":
            # LitGPT leaves it uninitialised.
            torch.nn.init.normal_(module.weight, std=0.02)
    initial = digest(*model.state_dict().values())
    ids = torch.randint(0, 64, (2, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    logits = model(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = digest(*(p.grad for p in model.parameters() if p.grad is not None))
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, Path(folder))
        saved = (Path(folder) / "model_config.yaml").read_text()
        read_back = Config.from_file(Path(folder) / "model_config.yaml")
    own_fields = [f for f in asdict(config) if f in asdict(read_back)]
    return {
        "initial weights": initial,
        "names": hashlib.sha256("".join(model.state_dict()).encode()).hexdigest()[:16],
        "modules": hashlib.sha256(
            "".join(f"{type(m).__module__}.{type(m).__name__}" for m in model.modules()).encode()
        ).hexdigest(),
        "logits": digest(logits),
        "gradients": gradients,
        "weights after a step": digest(*model.state_dict().values()),
        "rope": digest(model.cos, model.sin),
        "saved yaml": saved,
        "read back": str(all(getattr(config, f) == getattr(read_back, f) for f in own_fields)),
        "random state": digest(torch.get_rng_state()),
    }


def open_checkpoint(directory: str) -> str:
    try:
        Config.from_file(Path(directory) / "model_config.yaml")
    except Exception as error:
        return str(error)
    return "opens"


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {label: report(name, changes) for label, (name, changes) in CONFIGS.items()}
    result["plugin active"] = "litgpt_moe_ext.host.registration" in sys.modules and hasattr(
        Config, "attention_class_name"
    )
    result["loaded"] = LOADED
    # Modules that were imported before their changes could be arranged.
    result["unchanged"] = sorted(_finder.after.keys() & sys.modules.keys())
    result["a checkpoint of the plugin"] = open_checkpoint(sys.argv[1])
    print("REPORT" + json.dumps(result))
