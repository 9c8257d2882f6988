"""LitGPT's validation, ended early by a signal, as the cluster or the user may not wait until it is over.

An incomplete validation loss is not logged; a resumed run repeats the validation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.parallel.agreement import Agreement
from litgpt_moe_ext.training.steps.first_batches import FirstBatches

if TYPE_CHECKING:
    from litgpt_moe_ext.training.fabric import TrainingFabric


class StoppableValidation(Callback):
    """Checks for signals between the batches of a validation, and remembers whether one was cut short.

    Args:
        fabric: The running Fabric.
        stop: Called with a signal, on all processes before the same batch; if it returns, the validation continues.
        first_batches: Checks the first batch of the loader.

    Attributes:
        is_due: Whether a validation is under way, or was cut short and must be repeated.
    """

    def __init__(self, fabric: TrainingFabric, stop: Callable[[int], None], first_batches: FirstBatches) -> None:
        self._fabric, self._stop, self._first_batches = fabric, stop, first_batches
        self._agreement = Agreement(fabric, lambda: (fabric.stop_requests.received,))
        self._shared: int | None = None
        self.is_due = False

    def wrap(self, validate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return LitGPT's validation, stoppable by a signal between batches."""

        def stoppable(fabric: Any, model: Any, loader: Any, max_iters: int, verbose: bool = True) -> Tensor:
            # LitGPT's sanity check (not verbose) does not count as a validation.
            was_due, self.is_due = self.is_due, self.is_due or verbose
            loss = validate(fabric, model, self._batches(loader, max_iters), max_iters=max_iters, verbose=verbose)
            self.is_due = was_due and not verbose
            return loss

        return stoppable

    def _batches(self, loader: Iterable[Tensor], max_iters: int) -> Iterator[Tensor]:
        looked_at = min(max_iters, self._in_common(loader))
        for number, batch in enumerate(loader):
            self._first_batches.check("val_dataloader", batch)
            if number < looked_at:
                (signal_number,) = self._agreement.reached_earlier()
                if signal_number:
                    looked_at = 0
                    self._stop(signal_number)
            yield batch

    def _in_common(self, loader: Any) -> int:
        """Return the number of batches that every process has; 0 if unknown."""
        if self._shared is None:
            try:
                self._shared = len(loader)
            except TypeError:
                self._shared = 0
            if self._fabric.world_size > 1:
                own = torch.tensor(self._shared, device=self._fabric.device)
                torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.MIN)
                self._shared = int(own)
        return self._shared

    def state_dict(self) -> dict[str, Any]:
        """Return whether a validation was cut short."""
        return {"is_due": True} if self.is_due else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Validate before the next step if the last validation was cut short."""
        self.is_due = bool(state["is_due"])
