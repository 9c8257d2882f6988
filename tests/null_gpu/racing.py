"""A rank on a null GPU: read what another stream may not have written yet, or wait for it before.

Run by `test_races.py` with the name of a way, and `wait` for the right one. Its last line is what was read.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

import tests.null_gpu.computing  # noqa: F401  # before anything is computed

CARD = torch.device("cuda", int(os.environ["RANK"]))


@contextlib.contextmanager
def beside(wait: bool) -> Iterator[None]:
    """Let another stream do what is in the scope, and the usual one wait until that is done, or not."""
    usual, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(usual)
    with torch.cuda.stream(other):
        yield
    if wait:
        usual.wait_stream(other)


def by_a_stream(wait: bool) -> float:
    """Another stream adds one."""
    ones = torch.ones(3, device=CARD)
    with beside(wait):
        ones.add_(1)
    return float(ones.sum())


def by_a_graph(wait: bool) -> float:
    """A graph that is replayed on another stream adds one."""
    ones, graph = torch.ones(3, device=CARD), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ones.add_(1)
    with beside(wait):
        graph.replay()
    return float(ones.sum())


def for_a_graph(wait: bool) -> float:
    """A graph adds up what another stream has written."""
    ones, graph = torch.ones(3, device=CARD), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = ones.sum()
    with beside(wait):
        ones.add_(1)
    graph.replay()
    return float(total)


def by_the_other_rank(wait: bool) -> float:
    """NCCL adds the ones of the other rank."""
    dist.init_process_group("nccl", device_id=CARD)
    ones = torch.ones(3, device=CARD)
    work = dist.all_reduce(ones, async_op=True)
    if wait:
        work.wait()
    return float(ones.sum())


WAYS: dict[str, Callable[[bool], float]] = {
    way.__name__: way for way in (by_a_stream, by_a_graph, for_a_graph, by_the_other_rank)
}

if __name__ == "__main__":
    torch.cuda.set_device(CARD)
    print(WAYS[sys.argv[1]](sys.argv[2] == "wait"), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
