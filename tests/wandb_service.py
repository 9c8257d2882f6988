"""The process that wandb's client talks to."""

import contextlib
import threading

import psutil
import wandb

_PATIENCE = 30.0  # seconds, for what takes it less than one


def end_service() -> None:
    """End it, and with it what it knows of the environment.

    A request that was given up a moment before can make it miss that it should end: its answer finds nobody, so it
    reads no further, and waits ten minutes for another client.
    """
    patience = threading.Timer(_PATIENCE, _kill)
    patience.start()
    with contextlib.suppress(SystemExit):  # wandb's own, with the status of the process
        wandb.teardown()
    patience.cancel()


def _kill() -> None:
    for child in psutil.Process().children():
        if child.name() == "wandb-core":
            child.kill()
