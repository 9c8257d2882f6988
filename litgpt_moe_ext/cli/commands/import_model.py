"""`litgpt-moe import`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """Write a Hugging Face checkpoint as a LitGPT checkpoint with this package's layers.

    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, ERNIE-4.5-MoE, GLM-4-MoE, GPT-2, Llama and Qwen3. The result trains on with
    `run_train.py --initial_checkpoint_dir`, and `litgpt generate` and `litgpt-moe experts` open it.

    Attributes:
        hf_dir: A directory with config.json and safetensors, or a repository on the hub (OWNER/NAME).
        out_dir: The new directory, which must not exist.
    """

    hf_dir: Path
    out_dir: Path

    def run(self) -> None:
        """Import the checkpoint."""
        from litgpt_moe_ext.export.hf.read import import_checkpoint

        hf_dir = self.hf_dir
        if not hf_dir.exists() and len(hf_dir.parts) == 2:
            from huggingface_hub import snapshot_download

            patterns = ["*.json", "*.safetensors", "tokenizer.model"]
            hf_dir = Path(snapshot_download(str(hf_dir), allow_patterns=patterns))
        config = import_checkpoint(hf_dir, self.out_dir)
        print(f"Wrote {self.out_dir}: {config.n_layer} layers of {config.n_embd}, {config.mlp_class_name}")
