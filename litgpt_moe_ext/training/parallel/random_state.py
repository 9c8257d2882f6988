"""The random generators of a rank: one stream each, resumed exactly."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from litgpt_moe_ext.wording import counted


def of_this_rank(device: torch.device) -> dict[str, Any]:
    """Return the states of the generators that training uses: torch's on the CPU and this rank's device, and Python's.

    Args:
        device: Device of this rank.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: dict[str, Any], device: torch.device) -> bool:
    """Set the generators to a state that `of_this_rank` returned.

    Returns:
        Whether all of them were set; False if the state comes from a rank on another type of device.
    """
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    return (device.type == "cuda") == ("cuda" in state)


@contextlib.contextmanager
def undisturbed(fabric: Any, model: nn.Module) -> Iterator[Any]:
    """Yield a model in evaluation mode and the training's precision; restore mode and random generators afterwards.

    lm-eval and its tasks may draw from Python's, NumPy's and torch's generators.
    """
    generators, numpy_generator = of_this_rank(fabric.device), np.random.get_state()
    was_training = model.training
    model.eval()
    try:
        with fabric.autocast():
            yield model
    finally:
        model.train(was_training)
        restore(generators, fabric.device)
        np.random.set_state(numpy_generator)


class RankStreams:
    """The random streams of a run's ranks.

    Args:
        fabric: The running `TrainingFabric`.

    Attributes:
        resumed: The states of all ranks in the loaded checkpoint, until they are restored.
    """

    def __init__(self, fabric: Any) -> None:
        self._fabric = fabric
        self._restored = False
        self.resumed: list[dict[str, Any]] | None = None

    def to_save(self) -> list[dict[str, Any]] | None:
        """Return the states of all ranks in order; before the first batch, those of the checkpoint, if any.

        Every rank must call this.
        """
        if not self._restored:
            return self.resumed
        states: list = [of_this_rank(self._fabric.device)]
        if self._fabric.world_size > 1:
            (own,), states = states, [None] * self._fabric.world_size
            torch.distributed.all_gather_object(states, own)
        return states

    def restore_or_seed(self, seed: int) -> None:
        """At the first call, continue the streams from the checkpoint, or give each rank its own.

        Args:
            seed: Seed of the run.
        """
        if self._restored:
            return
        self._restored = True
        fabric, saved, self.resumed = self._fabric, self.resumed, None
        if saved is not None and len(saved) == fabric.world_size:
            if not restore(saved[fabric.global_rank], fabric.device):
                fabric.print("The checkpoint comes from another type of device, whose random generator starts anew.")
            return
        if saved is not None:
            fabric.print(
                f"The checkpoint has the random generators of {counted(len(saved), 'process')}, this run has "
                f"{fabric.world_size}: they start anew, which matters only if training draws random numbers."
            )
        seed_rank(seed, fabric.global_rank, fabric.world_size, fabric.step)


def seed_rank(seed: int, rank: int, world_size: int, step: int = 0) -> None:
    """Give every rank its own random stream; until now, all have drawn the same numbers.

    LitGPT seeds all ranks alike, as initial weights require. Without this, dropout, jitter and router noise would then
    be the same on all ranks, for different tokens. A single process keeps its stream.

    Args:
        seed: Seed of the run.
        rank: Rank of this process.
        world_size: Number of ranks.
        step: Finished optimizer steps, so that a run resumed with another number of ranks repeats no numbers.
    """
    if world_size > 1:
        own = random.Random(f"{seed}, step {step}, rank {rank} of {world_size}").getrandbits(63)
        torch.manual_seed(own)
        random.seed(own)
