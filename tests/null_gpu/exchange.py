"""One of two ranks on null GPUs: exchange tensors over NCCL and check what comes, or make a mistake that is named.

Run by `test_nccl.py`; what a mistake leads to is the last line that it prints.
"""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import tests.null_gpu.computing  # noqa: F401  # what is sent must have been computed

RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
CARD = torch.device("cuda", RANK)
# More than a chunk, and no multiple of one.
SIZE = 150_001 * 2
REDUCTIONS: dict[dist.ReduceOp.RedOpType, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.PRODUCT: torch.mul,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)


def numbers(dtype: torch.dtype) -> list[Tensor]:
    """Return what every rank has, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    if dtype in FLOATS:
        return [torch.randn(SIZE, generator=generator).to(dtype) for _ in range(RANKS)]
    return [torch.randint(0, 11, (SIZE,), generator=generator).to(dtype) for _ in range(RANKS)]


def reductions(dtype: torch.dtype) -> None:
    """As the CPU adds up, bit for bit: the order is that of the ranks."""
    all_numbers = numbers(dtype)
    for kind, reduce in REDUCTIONS.items():
        expected = reduce(*all_numbers)
        x = all_numbers[RANK].to(CARD)
        dist.all_reduce(x, kind)
        assert torch.equal(x.cpu(), expected), (dtype, kind)
        x = all_numbers[RANK].to(CARD)
        dist.reduce(x, 1, kind)
        assert torch.equal(x.cpu(), expected if RANK == 1 else all_numbers[RANK])
        part = torch.empty(SIZE // RANKS, dtype=dtype, device=CARD)
        dist.reduce_scatter_tensor(part, all_numbers[RANK].to(CARD), kind)
        assert torch.equal(part.cpu(), expected.chunk(RANKS)[RANK])
    kinds = [dist.ReduceOp.AVG, *([dist._make_nccl_premul_sum(0.5)] if dtype in FLOATS else [])]
    for kind in kinds:
        x = all_numbers[RANK].to(CARD)
        dist.all_reduce(x, kind)
        halves = [part * 0.5 for part in all_numbers]
        assert torch.equal(x.cpu(), torch.add(*halves) if dtype in FLOATS else torch.add(*all_numbers) // 2)


def copies() -> None:
    """What moves without being added."""
    all_numbers = numbers(torch.float32)
    mine = all_numbers[RANK].to(CARD)
    everything = torch.empty(RANKS * SIZE, device=CARD)
    dist.all_gather_into_tensor(everything, mine)
    assert torch.equal(everything.cpu(), torch.cat(all_numbers))
    uneven = [torch.empty(3 + rank, device=CARD) for rank in range(RANKS)]
    dist.all_gather(uneven, torch.full((3 + RANK,), float(RANK), device=CARD))
    assert [x.tolist() for x in uneven] == [[0.0] * 3, [1.0] * 4]
    x = mine.clone()
    dist.broadcast(x, 1)
    assert torch.equal(x.cpu(), all_numbers[1])
    swapped = torch.empty_like(mine)
    dist.all_to_all_single(swapped, mine)
    assert torch.equal(swapped.cpu(), torch.cat([x.chunk(RANKS)[RANK] for x in all_numbers]))
    other = torch.empty_like(mine)
    both = [dist.P2POp(dist.isend, mine, 1 - RANK), dist.P2POp(dist.irecv, other, 1 - RANK)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    assert torch.equal(other.cpu(), all_numbers[1 - RANK])
    objects = [None] * RANKS
    dist.all_gather_object(objects, {"rank": RANK})
    assert objects == [{"rank": 0}, {"rank": 1}]
    alone = [dist.new_group([rank]) for rank in range(RANKS)][RANK]
    dist.all_reduce(x, group=alone)
    assert torch.equal(x.cpu(), all_numbers[1])


def one_dies() -> None:
    """While the other waits for it."""
    if RANK == 1:
        os._exit(0)
    dist.all_reduce(torch.ones(3, device=CARD))


def captured() -> None:
    """In a graph, which cannot be replayed."""
    graph, x = torch.cuda.CUDAGraph(), torch.ones(3, device=CARD)
    dist.all_reduce(x)
    with torch.cuda.graph(graph):
        dist.all_reduce(x)


def another_operation() -> None:
    """On one rank."""
    x = torch.ones(3, device=CARD)
    dist.all_reduce(x) if RANK else dist.broadcast(x, 0)


MISTAKES: dict[str, Callable[[], object]] = {
    "count": lambda: dist.all_reduce(torch.ones(3 + RANK, device=CARD)),
    "type": lambda: dist.all_reduce(torch.ones(3, device=CARD, dtype=(torch.float16, torch.bfloat16)[RANK])),
    "operation": another_operation,
    "death": one_dies,
    "graph": captured,
}


def connect(card: torch.device) -> None:
    """Make a communicator with the other rank."""
    torch.cuda.set_device(card)
    dist.init_process_group("nccl", device_id=card)


def main(mistake: str | None = None) -> None:
    """Do all that is right, or one thing that is wrong."""
    if mistake is None:
        connect(CARD)
        for dtype in (*FLOATS, *INTEGERS):
            reductions(dtype)
        copies()
        dist.barrier()
        dist.destroy_process_group()
        print("done")
        return
    try:
        connect(torch.device("cuda", 0) if mistake == "device" else CARD)
        MISTAKES[mistake]()
    except RuntimeError as error:
        print("refused:", " ".join(str(error).split()), flush=True)
    os._exit(0)  # a communicator with an error is not to be ended in order


if __name__ == "__main__":
    main(*sys.argv[1:])
