"""`litgpt-moe import` and `litgpt-moe export`: checkpoints of other libraries, to and fro."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litgpt_moe_ext.wording import counted, in_shell


@dataclass(frozen=True)
class Import:
    """Write a Hugging Face checkpoint as a LitGPT checkpoint with this package's layers.

    Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, ERNIE-4.5-MoE, GLM-4-MoE, GPT-OSS, DeepSeek-V2 and -V3,
    GPT-2, Llama and Qwen3. Weights in MXFP4 (GPT-OSS) and FP8 by blocks (DeepSeek-V3) are
    dequantized. `litgpt-moe train --initial_checkpoint_dir` trains the result further, and
    `litgpt generate` and `litgpt-moe experts` open it.

    Attributes:
        hf_dir: A directory with config.json and safetensors, or a repository on the hub (OWNER/NAME).
        out_dir: The new directory, which must not exist.
    """

    hf_dir: Path
    out_dir: Path

    def run(self) -> None:
        """Import the checkpoint."""
        from litgpt_moe_ext.export.hf.read import import_checkpoint
        from litgpt_moe_ext.export.hub import downloaded

        done = import_checkpoint(downloaded(self.hf_dir), self.out_dir)
        config = done.config
        if done.dequantized != "none":
            print(f"Dequantized {done.dequantized} weights")
        if done.left_out:
            left_out = counted(len(done.left_out), "tensor")
            print(f"Left out {left_out} of multi-token prediction ({done.left_out[0]}, ...)")
        print(f"Wrote {self.out_dir}: {counted(config.n_layer, 'layer')} of {config.n_embd}, {config.mlp_class_name}")
        if problem := _problem_with_tokenizer(self.hf_dir, self.out_dir, config.padded_vocab_size):
            print(f"{problem}. `litgpt generate` needs one in {self.out_dir}")
        flags = ["--model_config", str(self.out_dir), "--initial_checkpoint_dir", str(self.out_dir)]
        flags += ["--train.tie_embeddings", "true"] if done.tied else []
        print(f"Train it further: {in_shell('litgpt-moe', 'train', '--config', 'RECIPE', *flags)}")


def _problem_with_tokenizer(hf_dir: Path, out_dir: Path, vocab_size: int) -> str | None:
    from litgpt_moe_ext.errors import SettingsError
    from litgpt_moe_ext.evaluation.loading import VOCABULARY_FILES
    from litgpt_moe_ext.export.source import read_tokenizer

    try:
        tokenizer = read_tokenizer(out_dir, vocab_size)
    except SettingsError as error:
        return str(error).removeprefix("checkpoint_dir: ")
    return f"{hf_dir} has no tokenizer ({' or '.join(VOCABULARY_FILES)})" if tokenizer is None else None


@dataclass(frozen=True)
class Export:
    """Write a checkpoint for transformers and vLLM, or for llama.cpp.

    hf: the first Hugging Face class that computes exactly this model; if there is none, the model's own code is written
    beside its weights. gguf: the first graph of llama.cpp that computes it; if there is none, the export is refused.
    Nothing is approximated.

    Attributes:
        checkpoint_dir: A checkpoint of a run: step-*, best, final, or the ema directory in one of them.
        out_dir: The new directory, which must not exist.
        format: Hugging Face's files, or model.gguf.
        dtype: Floating type of the weights; null keeps theirs.
        push_to_hub: Repository on the Hugging Face hub to upload the directory to.
    """

    checkpoint_dir: Path
    out_dir: Path
    format: Literal["hf", "gguf"] = "hf"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    push_to_hub: str | None = None

    def run(self) -> None:
        """Export the checkpoint."""
        from litgpt_moe_ext.export.formats import export
        from litgpt_moe_ext.export.hub import check_repository, upload

        if self.push_to_hub is not None:
            check_repository(self.push_to_hub)
        for line in export(self.checkpoint_dir, self.out_dir, self.format, self.dtype):
            print(line)
        if self.push_to_hub is not None:
            print(upload(self.out_dir, self.push_to_hub))
