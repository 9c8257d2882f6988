"""What happens to computations while a graph is captured: they are kept, and made at every replay."""

from collections.abc import Callable

import torch

from tests.null_gpu.computing.graph import Graph

# Of every torch graph, and what is being captured.
_kept: dict[int, Graph] = {}
_capturing: Graph | None = None
# How many random numbers were drawn before the replay that is under way, and in the graph so far.
_drawn_before = _drawn_in_graph = 0


def graph_of(graph: torch.cuda.CUDAGraph) -> Graph:
    """Return what was captured in it."""
    return _kept[id(graph)]


def compute(computation: Callable[[], None]) -> None:
    """Do it, or keep it for the graph that is being captured.

    Args:
        computation: Works on memory, and returns nothing.
    """
    if is_capturing():
        _capturing.add(computation, torch.cuda.current_stream().cuda_stream)
    else:
        computation()


def is_capturing() -> bool:
    """Return whether what is started now is captured."""
    return _capturing is not None and torch.cuda.is_current_stream_capturing()


def draw(count: int) -> Callable[[], int]:
    """Take note of random numbers that are drawn at this place of the graph that is being captured.

    Args:
        count: How many.

    Returns:
        A function that, within a replay, returns how many were drawn before.
    """
    global _drawn_in_graph
    in_graph = _drawn_in_graph
    _drawn_in_graph += count
    return lambda: _drawn_before + in_graph


def install() -> None:
    """Let torch's graphs keep and make them."""
    graph = torch.cuda.CUDAGraph
    begin, end, replay, reset = graph.capture_begin, graph.capture_end, graph.replay, graph.reset

    def capture_begin(self, *args, **kwargs) -> None:
        global _capturing, _drawn_in_graph
        begin(self, *args, **kwargs)
        _capturing, _drawn_in_graph = Graph(torch.cuda.current_stream().cuda_stream), 0
        _kept[id(self)] = _capturing

    def capture_end(self) -> None:
        global _capturing
        captured, _capturing = _capturing, None
        end(self)
        captured.end()

    def replay_all(self) -> None:
        global _drawn_before
        _drawn_before = torch.cuda.default_generators[torch.cuda.current_device()].get_offset()
        replay(self)
        graph_of(self).replay()

    def forget(self) -> None:
        _kept.pop(id(self), None)
        reset(self)

    graph.capture_begin, graph.capture_end, graph.replay, graph.reset = capture_begin, capture_end, replay_all, forget
