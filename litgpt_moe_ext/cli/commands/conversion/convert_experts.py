"""`litgpt-moe convert-experts`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ConvertExperts:
    """Write a checkpoint with LitGPT's own LLaMAMoE layers, which opens without this plugin.

    LLaMAMoE has SwiGLU experts only, with one of two routers, and LitGPT's attention has neither sinks nor Hugging
    Face's YaRN. Models that need more cannot be converted; an imported Mixtral can. Models of the recipes in `configs/`
    cannot: they have sinks, other activations, or a balancing bias. The error names every setting in the way.

    Attributes:
        checkpoint_dir: A checkpoint with this package's MoE layers.
        out_dir: Directory of the new checkpoint, which must not exist.
        layout: How experts are stored; llama-moe is one module per expert.
    """

    checkpoint_dir: Path
    out_dir: Path
    layout: Literal["llama-moe"] = "llama-moe"

    def run(self) -> None:
        """Convert the checkpoint."""
        from litgpt_moe_ext.export.llama_moe import convert_checkpoint

        convert_checkpoint(self.checkpoint_dir, self.out_dir)
        print(f"Wrote {self.out_dir} in the {self.layout} layout")
