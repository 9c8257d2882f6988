"""Going on with another number of processes, or another micro batch, than the checkpoint was written with.

The data loaders of the plugin cut a global batch, a contiguous piece of the epoch's order, into one part for each
process. The number of windows that all of them have seen is therefore all that a position means, and it can be
expressed in batches of any other size, as long as it is a whole number of them.

A position of litdata's is that of every worker of every process, and goes with their number and the batches only.
"""

from collections.abc import Iterator
from typing import Any

from litgpt_moe_ext.errors import FROM_ITS_WEIGHTS, SettingsError
from litgpt_moe_ext.wording import counted


def convert_position(state: dict[str, Any], batch_size: int, world_size: int) -> dict[str, Any]:
    """Return a data loader's state in batches of `batch_size` windows on each of `world_size` processes.

    Args:
        state: As `TokenLoader.state_dict` returns it. A state of another loader is returned as it is.
        batch_size: Micro batch of the present run.
        world_size: Number of processes of the present run.

    Raises:
        SettingsError: If the position lies inside a batch of the present run, or litdata would misread it.
    """
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
        # What is left fills no batch of the present run, whose epoch ends here.
        return {**converted, "epoch": state["epoch"] + 1, "position": 0}
    return {**converted, "position": windows // batch}


def _positions_of_litdata(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the position in each data set of litdata's `StreamingDataLoader`, if it is one's state."""
    data = state.get("dataset")
    if isinstance(data, dict):
        for position in (data, *data.values()):
            if isinstance(position, dict) and {"batch_size", "world_size", "num_samples_yielded"} <= position.keys():
                yield position
