"""`litgpt serve` on models of the plugin: requests are refused with a reason, and all processes end with the first."""

import inspect
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

from litgpt_moe_ext.config.fields import uses_plugin
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE
from litgpt_moe_ext.host.commands import config_in
from litgpt_moe_ext.host.replaced import wrapping


def answer_refusals(serve: Any) -> None:
    """Answer a request that cannot be served with what is wrong (status 400), not with an internal error."""

    @wrapping(serve.BaseLitAPI, "setup")
    def setup(original: Any, self: Any, device: str) -> None:
        original(self, device)
        if uses_plugin(self.llm.config):
            self.llm.generate = answering(self.llm.generate)


def answering(generate: Any) -> Any:
    """Return a function like `LLM.generate` that raises what it refuses as an answer of the server."""

    @wraps(generate)
    def answer(*args: Any, **kwargs: Any) -> Any:
        with _refusals():
            result = generate(*args, **kwargs)
        return _pieces(result) if inspect.isgenerator(result) else result

    return answer


def _pieces(stream: Iterator[Any]) -> Iterator[Any]:
    with _refusals():
        yield from stream


@contextmanager
def _refusals() -> Iterator[None]:
    from fastapi import HTTPException  # a dependency of the server alone

    try:
        yield
    except SettingsError as error:
        raise HTTPException(400, str(error)) from error
    except NotImplementedError as error:
        # LitGPT's for more tokens than the model takes, in these words; torch's is for what a device cannot do.
        if "max_seq_length" not in str(error):
            raise
        remedy = "send a shorter one, or serve with fewer --max_new_tokens"
        raise HTTPException(400, f"prompt: with what is to be written, it is too long ({error}); {remedy}") from error


def end_with_its_processes(serve: Any) -> None:
    """Have SIGTERM end all processes of the server, as Ctrl-C does, and refuse weights that are cut off before."""

    @wrapping(serve, "run_server")
    def run_server(original: Any, checkpoint_dir: Path, *args: Any, **kwargs: Any) -> None:
        from litgpt.utils import extend_checkpoint_dir

        from litgpt_moe_ext.files.archives import refuse_cut_off

        config = config_in(checkpoint_dir)
        if config is None or not uses_plugin(config):
            original(checkpoint_dir, *args, **kwargs)
            return
        weights = extend_checkpoint_dir(Path(checkpoint_dir)) / WEIGHTS_FILE
        if weights.is_file():  # else LitGPT says so
            refuse_cut_off(weights, "checkpoint_dir")
        with _interrupted_by_sigterm():
            original(checkpoint_dir, *args, **kwargs)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """In the scope, raise KeyboardInterrupt at SIGTERM, after which LitServe ends its processes, and exit after it."""
    process, terminated = os.getpid(), False

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal terminated
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a fork ends as it would without this handler
            os.kill(os.getpid(), number)
        terminated = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if not terminated:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if terminated:
        for child in multiprocessing.active_children():  # of a server that was still starting
            child.terminate()
        sys.exit(128 + signal.SIGTERM)
