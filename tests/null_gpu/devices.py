"""Two null GPUs in one process: run by `test_nccl.py`."""

import pytest
import torch
import triton
from triton import language as tl

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@triton.jit
def _fill(x, n: tl.constexpr):
    tl.store(x + tl.arange(0, n), 1.0)


def properties() -> None:
    """They are told apart, as NCCL and Lightning do."""
    assert torch.cuda.device_count() == 2
    ids = [torch.cuda.get_device_properties(card) for card in (FIRST, SECOND)]
    assert len({str(one.uuid) for one in ids}) == len({one.pci_bus_id for one in ids}) == 2


def memory() -> None:
    """Of its own."""
    kept = torch.empty(48 << 20, dtype=torch.uint8, device=SECOND)
    free = [torch.cuda.mem_get_info(card)[0] for card in (FIRST, SECOND)]
    assert free[0] >= (64 << 20) - (4 << 20)
    assert free[1] <= 16 << 20
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(48 << 20, dtype=torch.uint8, device=SECOND)
    assert torch.empty(48 << 20, dtype=torch.uint8, device=FIRST).device == FIRST
    assert kept.device == SECOND


def launches() -> None:
    """On the device that is the present one, in its streams, with pointers into its memory."""
    xs = {card: torch.zeros(16, device=card) for card in (FIRST, SECOND)}
    with torch.cuda.device(SECOND):
        _fill[(1,)](xs[SECOND], 16)
        with pytest.raises(ValueError, match="cannot be accessed from Triton"):
            _fill[(1,)](xs[FIRST], 16)
        stream = torch.cuda.Stream()
    event = torch.cuda.Event()
    event.record(stream)
    torch.cuda.current_stream(FIRST).wait_event(event)
    with pytest.raises(RuntimeError, match="device"):
        event.record(torch.cuda.current_stream(FIRST))


if __name__ == "__main__":
    properties()
    memory()
    launches()
    print("done")
