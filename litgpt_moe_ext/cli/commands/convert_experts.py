"""`litgpt-moe convert-experts`."""

from pathlib import Path
from typing import Literal


def convert_experts(checkpoint_dir: Path, out_dir: Path, layout: Literal["llama-moe"] = "llama-moe") -> None:
    """Write a checkpoint with LitGPT's own LLaMAMoE layers, which opens without this plugin.

    Args:
        checkpoint_dir: A checkpoint with SharedExpertMoE or NoisyTopKMoE layers.
        out_dir: The new checkpoint's directory, which must not exist.
        layout: How experts are stored: llama-moe, one module per expert.
    """
    import litgpt_moe_ext

    litgpt_moe_ext.register()
    from litgpt_moe_ext.export.llama_moe import convert_checkpoint

    convert_checkpoint(checkpoint_dir, out_dir)
    print(f"Wrote {out_dir} in the {layout} layout")
