"""Text written by the model while it trains."""

from collections import defaultdict
from typing import Any

import lightning as L
import torch
from litgpt.tokenizer import Tokenizer

from litgpt_moe_ext.evaluation.generation import GenerationSettings, generate
from litgpt_moe_ext.evaluation.sampling import Sampling
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
            for text in self._written():
                self._fabric.print(f"  sample | {_visible(text)}".replace("\n", "\n         | "))

    def _written(self) -> list[str]:
        """Return what became of each prompt."""
        texts, size = [""] * len(self._args.prompts), self._model.max_seq_length
        # For all prompts at once a pass takes hardly longer than for one; those at the end of the context write less.
        together: dict[int, dict[int, list[int]]] = defaultdict(dict)
        for number, prompt in enumerate(self._args.prompts):
            ids = self._tokenizer.encode(prompt).tolist()
            if 0 < len(ids) < size:
                together[min(self._args.max_new_tokens, size - len(ids))][number] = ids
            else:
                texts[number] = f"(the prompt {prompt!r} has {len(ids)} tokens; it must have 1 to {size - 1})"
        for new_tokens, prompts in together.items():
            try:
                written = self._continue(list(prompts.values()), new_tokens)
            except Exception as error:  # a failed sample should not end the run
                written = [f"(failed: {type(error).__name__}: {error})"] * len(prompts)
            for number, text in zip(prompts, written, strict=True):
                texts[number] = text
        return texts

    def _continue(self, prompts: list[list[int]], new_tokens: int) -> list[str]:
        sampling = Sampling(self._args.temperature, self._args.top_k)
        settings = GenerationSettings(max_gen_toks=new_tokens, sampling=sampling)
        with undisturbed(self._fabric, self._model) as model:
            torch.manual_seed(0)
            written = generate(model, prompts, settings, lambda ids: ids[-1] == self._tokenizer.eos_id)
        return [
            self._tokenizer.decode(torch.tensor(prompt + ids)) for prompt, ids in zip(prompts, written, strict=True)
        ]


def _visible(text: str) -> str:
    # An untrained model writes control bytes that move a terminal's cursor and make `grep` treat the log as binary.
    return "".join(letter if letter.isprintable() or letter in "\n\t" else repr(letter)[1:-1] for letter in text)
