"""`litgpt-moe perplexity`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import AtLeastTwo, PositiveInt
from litgpt_moe_ext.wording import counted, quoted

if TYPE_CHECKING:
    from litgpt import Tokenizer
    from torch import Tensor


@dataclass(frozen=True)
class Perplexity:
    """Measure perplexity and bits per byte of a checkpoint on a text, also by position in the context.

    Attributes:
        checkpoint_dir: A LitGPT checkpoint.
        text: Text files to read.
        data: In place of text: a token shard, or a folder of them (a prepared corpus), whose validation part is read.
        max_tokens: Maximum number of tokens to read.
        batch_size: Windows of the model's block size per forward pass.
        device: Where to run, for example cuda. Default: a GPU if there is one.
        dtype: Floating point type of the weights. Default: as in the checkpoint.
        json: File to write the figures to.
    """

    checkpoint_dir: Path
    text: list[Path] | None = None
    data: Path | None = None
    max_tokens: AtLeastTwo = 1_000_000
    batch_size: PositiveInt = 8
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    json: Path | None = None

    def run(self) -> None:
        """Print loss, perplexity and bits per byte."""
        from litgpt_moe_ext.inspect.texts import require_one_source

        require_one_source(self.text, self.data)
        import torch

        from litgpt_moe_ext.cli.output import progress, write_json
        from litgpt_moe_ext.evaluation.loading import (
            check_checkpoint_dir,
            choose_device,
            load_model,
            load_tokenizer,
            parse_dtype,
        )
        from litgpt_moe_ext.evaluation.perplexity import bytes_of, summarize
        from litgpt_moe_ext.evaluation.scoring import token_losses
        from litgpt_moe_ext.evaluation.tokenization import check_ids

        check_checkpoint_dir(self.checkpoint_dir)
        tokenizer = load_tokenizer(self.checkpoint_dir)
        parts = self._tokens(tokenizer)
        model = load_model(self.checkpoint_dir, choose_device(self.device), parse_dtype(self.dtype))
        check_ids(model, (int(part.max()) for part in parts), self.data)
        with progress("Scoring", sum(len(part) - 1 for part in parts)) as advance:
            scored = [token_losses(model, part, self.batch_size, advance) for part in parts]
        losses_N, contexts_N = (torch.cat(column) for column in zip(*scored, strict=True))
        result = summarize(losses_N, contexts_N, sum(bytes_of(part[1:].tolist(), tokenizer) for part in parts))
        _print_result(result)
        if self.json is not None:
            figures = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
            write_json(self.json, {"checkpoint": str(self.checkpoint_dir), **vars(result), **figures})

    def _tokens(self, tokenizer: "Tokenizer") -> "list[Tensor]":
        import torch

        from litgpt_moe_ext.inspect import texts

        if self.data is not None:
            return [torch.from_numpy(texts.open_tokens(self.data, tokenizer)[: self.max_tokens].astype("int64"))]
        if tokenizer.eos_id is None:
            raise SettingsError(
                f"checkpoint_dir: the tokenizer of {quoted(self.checkpoint_dir)} has no end-of-text token, after which "
                "a text begins; add eos_token to its tokenizer_config.json, or give --data SHARD in place of --text"
            )
        encoded = texts.encode(texts.read_files(self.text or []), tokenizer, self.max_tokens)
        # A document begins after an end-of-text token, as in training.
        return [torch.tensor([tokenizer.eos_id, *document.ids]) for document in encoded]


def _print_result(result) -> None:
    from litgpt_moe_ext.cli.output import print_table
    from litgpt_moe_ext.evaluation.perplexity import exp

    rows = [
        (f"{row['first']} to {row['last']} tokens", f"{row['tokens']:,}", f"{row['loss']:.4f}",
         f"{exp(row['loss']):.3f}")
        for row in result.by_position
    ]  # fmt: skip
    print_table("Loss by position", ("predicted from", "tokens", "loss", "perplexity"), rows)
    print(
        f"{counted(result.tokens, 'token')}, {counted(result.bytes, 'byte')}: loss {result.loss:.4f}, "
        f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte"
    )
