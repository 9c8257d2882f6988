"""Parts of a layer side by side, within CUDA graphs.

The kernels of a small layer leave most of a GPU idle, and each waits for the end of the one before. A graph starts a
kernel as soon as those are over whose results it needs, so parts that do not need each other are captured on different
streams; the numbers stay the same. Autograd runs a backward pass on the streams of its forward pass.

Outside of graphs the host would have more to do than the GPU gains, and large kernels fill a GPU by themselves. There,
everything stays on one stream.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of the activations that are read side by side. What one stream has allocated and another reads is not used
# again in the capture, so this also limits what it costs in memory: up to 6 MiB in each layer in 16 bits.
_MOST = 2**20

# The streams of each device beside the first: of parts of layers, and of gradients of weights.
_STREAMS: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
# What has not been waited for, by thread: a backward pass runs in autograd's. None where nothing goes side by side.
_unjoined: dict[int, list[torch.cuda.Stream]] | None = None


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """Let parts of layers run side by side that are captured in this scope, in any thread."""
    global _unjoined
    if torch.cuda.is_initialized():  # a capture is no time to make streams
        _streams(torch.device("cuda", torch.cuda.current_device()))
    before, _unjoined = _unjoined, {}
    try:
        yield
    finally:
        _unjoined = before


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """Let nothing run side by side in this scope."""
    global _unjoined
    before, _unjoined = _unjoined, None
    try:
        yield
    finally:
        _unjoined = before


def goes_aside(x: Tensor) -> bool:
    """Return whether what reads `x` may run beside what follows it."""
    return (
        _unjoined is not None
        and x.is_cuda
        and x.numel() <= _MOST
        and torch.cuda.is_current_stream_capturing()
        and torch.cuda.current_stream() not in _streams(x.device)
    )


@contextlib.contextmanager
def part(x: Tensor) -> Iterator[None]:
    """Run a part of a layer, and its backward pass, beside what follows it, up to `join`; only where `goes_aside(x)`.

    Args:
        x: The activations that it reads.
    """
    stream, _ = _streams(x.device)
    with _beside(stream):
        yield
    # Backward passes on both streams may hold it, and the last one lets go of it when its kernel has been started.
    x.record_stream(stream)


@contextlib.contextmanager
def gradients(x: Tensor) -> Iterator[None]:
    """Compute gradients of weights beside what follows, up to `join`; only where `goes_aside(x)`.

    Args:
        x: What they are computed of. The caller holds it, and all else that is read, until it has joined.
    """
    _, stream = _streams(x.device)
    with _beside(stream):
        yield


@contextlib.contextmanager
def _beside(stream: torch.cuda.Stream) -> Iterator[None]:
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    assert _unjoined is not None
    _unjoined.setdefault(threading.get_ident(), []).append(stream)


def join() -> None:
    """Have what follows wait for all that this thread has put aside."""
    if _unjoined:
        for stream in _unjoined.pop(threading.get_ident(), ()):
            torch.cuda.current_stream().wait_stream(stream)


def added(x: Tensor, other: Tensor | None) -> Tensor:
    """Return `x + other`, where `other` may have been computed aside; `x` if there is none."""
    if other is None:
        return x
    join()
    return x + other


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
    return _STREAMS[device]


class GradientOfBoth(torch.autograd.Function):
    """A sum whose addends both get their gradient before either is differentiated further."""

    @staticmethod
    def forward(ctx: Any, sum_TD: Tensor, added_TD: Tensor) -> Tensor:
        """Return `sum_TD`, to which `added_TD` has been added without its gradient."""
        del ctx, added_TD
        return sum_TD.view_as(sum_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient twice."""
        del ctx
        return grads[0], grads[0]
