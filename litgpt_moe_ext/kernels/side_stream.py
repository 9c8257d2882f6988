"""Runs independent parts of a layer concurrently within CUDA graphs.

The kernels of a small layer leave most of a GPU idle, and on one stream each waits for the one before. A graph starts a
kernel as soon as its inputs are ready, so independent parts are captured on different streams; results stay the same.
Autograd runs a backward pass on the streams of its forward pass.

Outside graphs the host would lose more than the GPU gains, and large kernels fill a GPU by themselves. There,
everything stays on one stream.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Most elements of activations that are read on a side stream. Memory that one stream allocates and another reads is not
# reused in the capture, so this also limits the cost in memory: up to 6 MiB per layer in 16 bits.
_MOST = 2**20

# The side streams of each device: for parts of layers, and for gradients of weights.
_STREAMS: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
# Streams that have not been joined, by thread, as backward passes run in autograd's. None if side streams are off.
_unjoined: dict[int, list[torch.cuda.Stream]] | None = None


@contextlib.contextmanager
def side_by_side() -> Iterator[None]:
    """Let parts of layers captured in this scope, in any thread, run concurrently."""
    global _unjoined
    if torch.cuda.is_initialized():  # before a capture, which must not create streams
        _streams(torch.device("cuda", torch.cuda.current_device()))
    before, _unjoined = _unjoined, {}
    try:
        yield
    finally:
        _unjoined = before


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """Let nothing run concurrently in this scope."""
    global _unjoined
    before, _unjoined = _unjoined, None
    try:
        yield
    finally:
        _unjoined = before


def goes_aside(x: Tensor) -> bool:
    """Return whether a part that reads `x` may run on a side stream."""
    return (
        _unjoined is not None
        and x.is_cuda
        and x.numel() <= _MOST
        and torch.cuda.is_current_stream_capturing()
        and torch.cuda.current_stream() not in _streams(x.device)
    )


@contextlib.contextmanager
def part(x: Tensor) -> Iterator[None]:
    """Run a part of a layer, and its backward pass, on a side stream until `join`; only if `goes_aside(x)`.

    Args:
        x: The activations that it reads.
    """
    stream, _ = _streams(x.device)
    with _beside(stream):
        yield
    # Backward passes on both streams may hold `x`, and the last one releases it when its kernel has been launched.
    x.record_stream(stream)


@contextlib.contextmanager
def gradients(x: Tensor) -> Iterator[None]:
    """Compute gradients of weights on a side stream until `join`; only if `goes_aside(x)`.

    Args:
        x: The activations of which they are computed. The caller must keep it, and all else that is read, until `join`.
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
    """Make the current stream wait for this thread's side streams."""
    if _unjoined:
        for stream in _unjoined.pop(threading.get_ident(), ()):
            torch.cuda.current_stream().wait_stream(stream)


def added(x: Tensor, other: Tensor | None) -> Tensor:
    """Return `x + other`, where `other` may come from a side stream; `x` if `other` is None."""
    if other is None:
        return x
    join()
    return x + other


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device), torch.cuda.Stream(device)
    return _STREAMS[device]


class GradientOfBoth(torch.autograd.Function):
    """A sum that passes its gradient to both addends before either is differentiated further."""

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
