"""Padding in LitGPT's own commands: it is not text, and steps and validations are means over the text.

`litgpt finetune_full` fills batches up with token 0. `litgpt.pretrain` and `litgpt.finetune.full` average the means of
micro-batches and ranks, so a token counts more, the fewer other tokens its micro-batch has. This package's own training
loop weights them by tokens; this module does so for `litgpt pretrain` with data of this package that pads, and for
`litgpt finetune_full` with a model of this package.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.config.features import MOE_CLASS_NAMES
from litgpt_moe_ext.config.fields import uses_plugin
from litgpt_moe_ext.host.replaced import replaced, wrapping

if TYPE_CHECKING:
    from torch import Tensor

    Counted = Callable[[Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _MarkPadding:
    # Collates samples and marks the padding of the inputs. (Processes of a data loader get a copy.)
    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        import torch

        from litgpt_moe_ext.tokens.padding import mark_padding

        batch = self.collate(samples)
        ids_BT = batch["input_ids"]
        # Labels do not tell: those of a prompt are masked too, although it is text.
        length_B1 = batch["token_counts"]["raw_plus_prompt_template"]
        batch["input_ids"] = mark_padding(ids_BT, torch.arange(ids_BT.size(1)) < length_B1)
        return batch


def mark_finetuning_padding(loop: Any) -> None:
    """Mark the padding in the batches of a finetuning loop of LitGPT, if the model has MoE layers."""

    @wrapping(loop, "fit")
    def fit(original: Any, *args: Any, **kwargs: Any) -> Any:
        from litgpt_moe_ext.tokens.padding import accept_padding
        from litgpt_moe_ext.training.steps.batches import unwrapped

        given = inspect.signature(original).bind(*args, **kwargs).arguments
        model = given["model"] if "model" in given else given["state"]["model"]
        if model.config.mlp_class_name in MOE_CLASS_NAMES:
            accept_padding()
            for loader in (given["train_dataloader"], given["val_dataloader"]):
                inner = unwrapped(loader)
                inner.collate_fn = _MarkPadding(inner.collate_fn)
        return original(*args, **kwargs)


def weigh_pretraining(pretrain: Any) -> None:
    """Let `main` of the module `litgpt.pretrain` average over tokens, if data of this package pads."""

    def counted(given: dict[str, Any]) -> Counted | None:
        # This package's own training replaces the iterator.
        is_litgpts = pretrain.CycleIterator.__module__ == "litgpt.utils"
        return _targets_of_rows if is_litgpts and getattr(given["data"], "pads", False) else None

    _wrap_main(pretrain, counted)


def weigh_finetuning(loop: Any) -> None:
    """Let `main` of the module `litgpt.finetune.full` average over tokens, for models of this package."""
    _wrap_main(loop, lambda given: _targets_and_text if uses_plugin(given["config"]) else None)


def _targets_of_rows(rows_BT: Tensor) -> tuple[Tensor, ...]:
    from litgpt_moe_ext.training.steps.batches import counts_for_loss

    return (counts_for_loss(rows_BT[:, 1:]),)


def _targets_and_text(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    # Prompts may be masked in the labels, but routers see them, so their losses are means over other tokens.
    from litgpt_moe_ext.training.steps.batches import counts_for_loss

    return counts_for_loss(batch["labels"][:, 1:]), batch["input_ids"] >= 0


def _wrap_main(loop: Any, choose: Callable[[dict[str, Any]], Counted | None]) -> None:

    @wrapping(loop, "main")
    def main(original: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        counted = choose(given)
        if counted is None:
            return original(*args, **kwargs)
        accumulation = given["train"].gradient_accumulation_iters(given["devices"], given["num_nodes"])
        with _Weighing(loop, given["fabric"], counted, accumulation).installed():
            return original(*args, **kwargs)


class _Weighing:
    """Averages over tokens where a loop of LitGPT averages over micro-batches and ranks.

    Args:
        loop: Its module, whose names are replaced within `installed`.
        fabric: Its fabric.
        counted: Returns which tokens of a batch count, one tensor for each kind of loss.
        accumulation: Micro-batches of a step on each rank.
    """

    def __init__(self, loop: Any, fabric: Any, counted: Counted, accumulation: int) -> None:
        from litgpt_moe_ext.training.steps.batches import StepBatches
        from litgpt_moe_ext.training.steps.losses import TokenMeans

        self._loop, self._fabric, self._first_iteration = loop, fabric, 0
        self._means = TokenMeans(fabric.world_size)
        self._batches = StepBatches(lambda fetched: counted(fetched[0]), accumulation, fabric.world_size)
        self._batches.counts = True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replace names of the loop within the scope."""
        loop, fabric = self._loop, self._fabric
        hooks = {
            "fit": self._fit(loop.fit),
            "CycleIterator": self._cycle_iterator(loop.CycleIterator),
            "RunningMean": self._running_mean(),
            "chunked_cross_entropy": self._cross_entropy(loop.chunked_cross_entropy),
            "validate": self._means.wrap_validation(loop.validate),
        }
        fabric.log_dict = self._log_dict(fabric.log_dict)
        try:
            with replaced(loop, hooks):
                yield
        finally:
            del fabric.log_dict

    def _fit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        from litgpt_moe_ext.training.steps.batches import unwrapped

        def fit(*args: Any, **kwargs: Any) -> Any:
            # Pretraining resumes its data where it stopped; finetuning starts over.
            goes_on = hasattr(unwrapped(kwargs["train_dataloader"]), "state_dict")
            self._first_iteration = kwargs["state"]["iter_num"] if goes_on else 0
            return original(*args, **kwargs)

        return fit

    def _cycle_iterator(self, original: type) -> type:
        weighing = self

        class CycleIterator:
            """LitGPT's iterator, a step ahead of the loop."""

            def __init__(self, iterable: Any) -> None:
                self.epoch = 0
                self._iterations = weighing._first_iteration
                source = original(iterable)
                self._fetch = lambda: (next(source), source.epoch)

            def __iter__(self) -> Iterator[Any]:
                return self

            def __next__(self) -> Any:
                batch = weighing._batches.next(self._fetch, self._iterations)
                self._iterations += 1
                weighing._means.weights = batch.weights
                data, self.epoch = batch.data
                return data

        return CycleIterator

    def _running_mean(self) -> type:
        import torch

        from litgpt_moe_ext.training.steps.losses import RunningMean as PlainMean

        means, fabric = self._means, self._fabric

        class RunningMean(PlainMean):
            """The mean over the tokens of the last micro-batches, on all ranks; LitGPT logs the first rank's."""

            def update(self, loss: Tensor) -> None:
                assert means.weights is not None
                super().update(torch.stack([loss, means.weights()[0].to(loss.dtype)]))

            def compute(self) -> Tensor:
                loss, weight = fabric.all_reduce(super().compute(), reduce_op="mean")
                return loss / weight.clamp(min=torch.finfo(weight.dtype).tiny)

        return RunningMean

    def _cross_entropy(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        from litgpt_moe_ext.moe.balancing.gradient_injection import remember_scale

        # Without the plugin's mark, which would tell auxiliary losses the weight of the targets.
        weigh = self._means.wrap_loss(inspect.unwrap(original))

        def chunked_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
            loss = weigh(*args, **kwargs)
            return remember_scale(loss, None if self._means.weights is None else self._means.weights()[-1])

        return chunked_cross_entropy

    def _log_dict(self, original: Callable[..., None]) -> Callable[..., None]:
        def log_dict(metrics: dict[str, Any], step: int | None = None) -> None:
            metrics = dict(metrics)
            self._batches.on_log(metrics)
            original(metrics, step=step)

        return log_dict
