"""`litgpt-moe convert-experts`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ConvertExperts:
    """Write a checkpoint with LitGPT's own LLaMAMoE layers, which opens without this plugin.

    LLaMAMoE has SwiGLU experts and one of two routers, and LitGPT's attention neither sinks nor Hugging Face's YaRN, so
    only models without these can be converted, such as an imported Mixtral. Of the recipes in `configs/` none can when
    it is trained: they have sinks, other activations, or a bias that balances. The error names every setting that is in
    the way.

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
