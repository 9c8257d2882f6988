"""Resuming with another number of processes or another micro-batch size than the checkpoint's.

The plugin's data loaders split each global batch, a contiguous piece of the epoch's order, among the processes. A
position is therefore just the number of windows seen by all processes, and can be expressed in batches of any size that
divides it.

litdata's position covers every worker of every process, and is valid only for the same processes and batch size.
"""

import copy
from collections.abc import Iterator
from typing import Any

from litgpt_moe_ext.errors import FROM_ITS_WEIGHTS, SettingsError
from litgpt_moe_ext.wording import counted


def convert_position(state: dict[str, Any], batch_size: int, world_size: int) -> dict[str, Any]:
    """Return a data loader's state in batches of `batch_size` windows on each of `world_size` processes.

    Args:
        state: State from `TokenLoader.state_dict`. A state of another loader is returned unchanged, but for mended
            epochs in litdata's.
        batch_size: Micro-batch size of the present run.
        world_size: Number of processes of the present run.

    Raises:
        SettingsError: If the position falls inside a batch of the present run, or litdata would misread it.
    """
    state = _in_right_epoch(state)
    for position in _positions_of_litdata(state):
        then = position["batch_size"], position["world_size"]
        if position["num_samples_yielded"] and then != (batch_size, world_size):
            raise SettingsError(
                f"train.micro_batch_size: {batch_size} on {counted(world_size, 'process')}: litdata can resume only "
                f"with {then[0]} on {counted(then[1], 'process')}, as in the checkpoint; otherwise it would repeat "
                f"some tokens and skip others. Use those, or {FROM_ITS_WEIGHTS}"
            )
    saved = state.get("fingerprint") or {}
    if "batch_size" not in saved or "world_size" not in saved:
        return state
    windows = state["position"] * saved["batch_size"] * saved["world_size"]
    batch = batch_size * world_size
    if windows % batch:
        raise SettingsError(
            f"train.micro_batch_size: {batch_size} on {counted(world_size, 'process')} makes batches of {batch}, but "
            f"the checkpoint stopped after {windows} sequences of its epoch, not a multiple of that. Use "
            f"{saved['batch_size']} on {counted(saved['world_size'], 'process')}, as it did, or another divisor"
        )
    converted = {**state, "fingerprint": {**saved, "batch_size": batch_size, "world_size": world_size}}
    if "windows" in saved and windows // batch == saved["windows"] // batch:
        # The remaining windows do not fill a batch of the present run, so its epoch ends here.
        return {**converted, "epoch": state["epoch"] + 1, "position": 0}
    return {**converted, "position": windows // batch}


def _in_right_epoch(state: dict[str, Any]) -> dict[str, Any]:
    # With workers, a data set of litdata that was resumed says that it is in its first epoch. Its loader knows better.
    if not any(True for _ in _positions_of_litdata(state)):
        return state
    mended = copy.deepcopy(state)
    for position in _positions_of_litdata(mended):
        position["current_epoch"] = mended["current_epoch"]
    return mended


def inexact_note(state: dict[str, Any]) -> str | None:
    """Return what litdata does not restore of a position, or None.

    It counts what all workers together have taken of each data set, and deals that out to them in whole batches, which
    of a mixture they have not taken.

    Args:
        state: State of a data loader.
    """
    positions = list(_positions_of_litdata(state))
    workers = max((position["num_workers"] for position in positions), default=0)
    if len(positions) < 2 or workers < 2 or positions[0]["batch_size"] == 1:
        return None
    return (
        f"data.num_workers: {workers}: of a mixture litdata finds its place only with 0 or 1; some sequences around "
        "this checkpoint may be trained on twice, and others left out"
    )


def _positions_of_litdata(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the position in each dataset, if this is a state of litdata's `StreamingDataLoader`."""
    data = state.get("dataset")
    if isinstance(data, dict):
        for position in (data, *data.values()):
            if isinstance(position, dict) and {"batch_size", "world_size", "num_samples_yielded"} <= position.keys():
                yield position
