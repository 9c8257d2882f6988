"""Races between streams end the process: PyTorch's own sanitizer, which here knows graphs and collectives as well.

`torch.cuda._sanitizer` follows every operator, event and wait on the host, so it needs no GPU. It would take what a
capture records for done on the capture's stream, not see a replay, and have a collective work on the caller's stream,
not on NCCL's. Where it looks on, the Triton kernels of rotation and sinks give way to operators.
"""

import sys
from typing import Any

import torch
import torch.distributed
from torch.cuda import _gpu_trace as gpu_trace
from torch.cuda import _sanitizer

_Accesses = tuple[set[int], set[int]]
_in_graph: dict[int, _Accesses] = {}
_capturing: _Accesses | None = None
# Streams that were made to wait since the last operator, and events that were recorded, with their streams.
_waiting: list[int] = []
_recorded: list[tuple[int, int]] = []

_launch = _sanitizer.EventHandler._handle_kernel_launch


def install() -> None:
    """Tell the sanitizer, which PyTorch has started, of graphs and collectives."""
    _sanitizer.EventHandler._handle_kernel_launch = _launched
    gpu_trace.register_callback_for_event_wait(lambda event, stream: _waiting.append(stream))
    gpu_trace.register_callback_for_event_record(lambda *event_and_stream: _recorded.append(event_and_stream))
    graph = torch.cuda.CUDAGraph
    graph.capture_begin = _beginning(graph.capture_begin)
    graph.capture_end = _ending(graph.capture_end)
    graph.replay = _replaying(graph.replay)
    torch.distributed.destroy_process_group = _after_all(torch.distributed.destroy_process_group)


def _launched(handler, stream, read, written, outputs, operator, names) -> list[Any]:
    if _capturing is not None and torch.cuda.is_current_stream_capturing():
        _capturing[0].update(read)
        _capturing[1].update(written)
        return []
    collective = str(operator).startswith("c10d::") and bool(_waiting)
    if collective:
        # NCCL's stream has just been made to wait for this one, and does the work.
        stream = _waiting[-1]
    errors = _launch(handler, stream, read, written, outputs, operator, names)
    if collective:
        # Its end was recorded while the operator ran, and the sanitizer hears of the operator when that has returned.
        for event, on in _recorded:
            if on == stream:
                handler.syncs.record_state(event, on)
    _waiting.clear()
    _recorded.clear()
    return errors


def _after_all(destroy):
    def destroy_process_group(*args, **kwargs):
        torch.cuda.synchronize()  # it waits until collectives are over, which a GPU that lags would be much later
        destroy(*args, **kwargs)

    return destroy_process_group


def _beginning(begin):
    def capture_begin(graph, *args, **kwargs):
        global _capturing
        begin(graph, *args, **kwargs)
        _capturing = set(), set()

    return capture_begin


def _ending(end):
    def capture_end(graph):
        global _capturing
        accesses, _capturing = _capturing, None
        end(graph)
        _in_graph[id(graph)] = accesses

    return capture_end


def _replaying(start):
    def replay(graph):
        start(graph)
        read, written = _in_graph[id(graph)]
        stream, names = torch.cuda.current_stream().cuda_stream, {pointer: [] for pointer in read | written}
        handler = _sanitizer.cuda_sanitizer.dispatch.event_handler
        if errors := _launch(handler, stream, read - written, written, set(), "a graph's replay", names):
            print(*errors, sep="\n", file=sys.stderr)
            raise _sanitizer.CUDASanitizerErrors(errors)

    return replay
