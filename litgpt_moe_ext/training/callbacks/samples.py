"""Text written by the model while it trains."""

from typing import Any

import lightning as L
import torch
from litgpt.generate.base import generate
from litgpt.tokenizer import Tokenizer

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.parallel.random_state import undisturbed
from litgpt_moe_ext.training.settings import SampleArgs


class TextSamples(Callback):
    """Continue a few prompts after every validation, without any effect on the training.

    Args:
        args: What to write.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, args: SampleArgs, tokenizer: Tokenizer) -> None:
        self._args = args
        self._tokenizer = tokenizer

    def on_after_setup(self, fabric: L.Fabric, module: Any) -> None:
        """Keep the model."""
        self._fabric, self._model = fabric, module.module

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """Write after a validation, on the first process."""
        if "val_loss" in metrics and self._fabric.is_global_zero:
            for prompt in self._args.prompts:
                try:
                    text = self._continue(prompt)
                except Exception as error:  # a failed sample should not end the run
                    text = f"(failed: {type(error).__name__}: {error})"
                self._fabric.print(f"  sample | {_visible(text)}".replace("\n", "\n         | "))

    def _continue(self, prompt: str) -> str:
        model, fabric = self._model, self._fabric
        ids = self._tokenizer.encode(prompt, device=fabric.device)
        # The cache holds all generated tokens except the last.
        room = model.max_seq_length - ids.numel()
        new_tokens = min(self._args.max_new_tokens, room)
        if ids.numel() == 0 or new_tokens < 1:
            return f"(the prompt {prompt!r} has {ids.numel()} tokens; it must have 1 to {model.max_seq_length - 1})"
        with undisturbed(fabric, model), fabric.init_tensor():
            torch.manual_seed(0)
            model.set_kv_cache(batch_size=1, device=fabric.device)
            try:
                written = generate(
                    model,
                    ids,
                    max_returned_tokens=ids.numel() + new_tokens,
                    temperature=self._args.temperature,
                    top_k=self._args.top_k,
                    eos_id=self._tokenizer.eos_id,
                )
            finally:
                model.clear_kv_cache()
        return self._tokenizer.decode(written)


def _visible(text: str) -> str:
    # An untrained model writes control bytes that move a terminal's cursor and make `grep` treat the log as binary.
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)
