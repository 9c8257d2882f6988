"""HellaSwag every so many optimizer steps, as a callback of the training's Fabric."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from litgpt.tokenizer import Tokenizer

from litgpt_moe_ext.evaluation.hellaswag import Item, Rule, encoder, evaluate


class HellaSwagCallback:
    """Adds `hellaswag/RULE/acc` and `hellaswag/RULE/acc_norm` to the log; the training goes on as if nothing happened.

    Processes share the questions; each must hold a whole model.

    Args:
        items: The questions.
        tokenizer: Of the model.
        rule: The rule.
        interval: Optimizer steps between evaluations; they happen at the first log line from then on.
        batch_size: Endings per forward pass.
    """

    def __init__(self, items: Sequence[Item], tokenizer: Tokenizer, rule: Rule, interval: int, batch_size: int) -> None:
        if interval < 1:
            raise ValueError(f"interval: {interval} must be at least 1 optimizer step")
        self._items, self._encode, self._rule = items, encoder(tokenizer), rule
        self._interval, self._batch_size = interval, batch_size
        self._next = interval

    def on_after_setup(self, fabric: L.Fabric, module: Any) -> None:
        self._fabric, self._model = fabric, module.module

    def on_log(self, metrics: dict[str, Any]) -> None:
        if "loss" not in metrics or metrics["step"] < self._next:
            return
        self._next = (metrics["step"] // self._interval + 1) * self._interval
        correct = torch.tensor(self._count(), dtype=torch.float64, device=self._fabric.device)
        acc, acc_norm, asked = self._fabric.all_reduce(correct, reduce_op="sum").tolist()
        metrics[f"hellaswag/{self._rule}/acc"] = acc / asked
        metrics[f"hellaswag/{self._rule}/acc_norm"] = acc_norm / asked

    def _count(self) -> list[int]:
        model, fabric = self._model, self._fabric
        items = self._items[fabric.global_rank :: fabric.world_size]
        was_training = model.training
        model.eval()
        try:
            with fabric.autocast():
                answers = evaluate(model, items, self._rule, self._encode, self._batch_size, lambda done: None)
        finally:
            model.train(was_training)
        return [sum(answer.acc for answer in answers), sum(answer.acc_norm for answer in answers), len(answers)]
