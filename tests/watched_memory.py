"""What only a card would show of a kernel, seen in Triton's interpreter: a plugin for the interpreted tests.

The interpreter runs one program after the other, each as a single thread, on memory whose neighbours it may read. On a
card programs run in any order, and the threads of a program do not wait for each other before they use global memory.
So a launch fails here where

- memory is used through an argument that it is no part of, be it between the rows of a view;
- two programs use the same memory, and one of them writes it or adds to it;
- a program writes memory and then uses it, or reads and then writes it, without `tl.debug_barrier()`;
- memory is read that nothing has written.

What nothing has written is not a number, and neither is what a load without `other` gives where it is masked: results
that are not written whole, or made of such numbers, equal nothing.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from tests import quick_interpreter

quick_interpreter.install()

# Every byte of memory that nothing has written: a NaN that no arithmetic gives, -1, neither true nor false.
UNWRITTEN = 255
# Pointers have the number of their argument before the bits of the address.
ADDRESS_BITS = np.uint64(48)
ADDRESS = np.uint64(2**48 - 1)


class Spans(NamedTuple):
    """Memory without gaps, in the order of addresses: where each piece begins and ends."""

    begins: np.ndarray
    ends: np.ndarray

    def find(self, addresses):
        """Return the piece in which, or behind which, each address is; before the first, that one."""
        return np.searchsorted(self.begins[1:], addresses, side="right")


def join(begins, ends):
    """Return pieces of memory, in any order and some over others, as those without gaps."""
    order = np.argsort(begins)
    begins, ends = begins[order], np.maximum.accumulate(ends[order])
    gaps = begins[1:] > ends[:-1]
    return Spans(begins[np.append(True, gaps)], ends[np.append(gaps, True)])


def spans_of(tensor):
    begins, length = np.array([tensor.data_ptr()], dtype=np.uint64), tensor.itemsize * min(tensor.numel(), 1)
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)) if length else ():
        step = stride * tensor.itemsize
        if step <= length and len(begins) == 1:
            length += step * (size - 1)
        else:
            begins = np.add.outer(begins, np.arange(size, dtype=np.uint64) * np.uint64(step)).ravel()
    return join(begins, begins + np.uint64(length))


class Launch:
    """The memory of a launch, and when it is used: a clock counts programs and barriers.

    Attributes:
        arguments: What each tensor is, and its memory.
        written: When each byte was last written; 0 is never. Of a number, its first byte stands for all.
        first_read: When it was first read.
        last_read: When it was last read.
        loaded: The blocks of addresses that the program has loaded since the last barrier.
    """

    def __init__(self, kernel, n_thread):
        self.kernel, self.n_thread = kernel, n_thread
        self.arguments, self.clock = [], 0

    def add(self, tensor):
        """Return the number of an argument, as pointers have it."""
        self.arguments.append((f"{tuple(tensor.shape)} of {tensor.dtype}", spans_of(tensor)))
        return np.uint64(len(self.arguments)) << ADDRESS_BITS

    def begin_program(self):
        if not self.clock:
            begins, ends = zip(*(spans for _, spans in self.arguments), strict=True)
            self.memory = join(np.concatenate(begins), np.concatenate(ends))
            sizes = (self.memory.ends - self.memory.begins).astype(np.int64)
            self.before = np.cumsum(sizes) - sizes
            self.written, self.first_read, self.last_read = np.zeros((3, sizes.sum()), dtype=np.int64)
        self.pass_barrier()
        self.program = self.clock

    def pass_barrier(self):
        self.clock, self.loaded = self.clock + 1, []

    def locate(self, pointers, n_byte):
        """Return the argument that pointers belong to, and the bytes of the launch's memory that they point to."""
        addresses, numbers = pointers & ADDRESS, pointers >> ADDRESS_BITS
        name, spans = self.arguments[int(numbers[0]) - 1]
        inside = (addresses >= spans.begins[0]) & (addresses + np.uint64(n_byte) <= spans.ends[spans.find(addresses)])
        self.check(name, {"used, but it does not reach so far": ~inside | (numbers != numbers[0])})
        span = self.memory.find(addresses)
        return name, self.before[span] + (addresses - self.memory.begins[span]).astype(np.int64)

    def read(self, pointers, n_byte, block):
        name, at = self.locate(pointers, n_byte)
        written = self.written[at]
        self.check(name, {
            "read after it was written, without a barrier": written >= self.clock,
            "read, and another program has written it": (written > 0) & (written < self.program),
        })  # fmt: skip
        self.first_read[at] = np.where(self.first_read[at], self.first_read[at], self.clock)
        self.last_read[at] = self.clock
        self.loaded.append(block)
        return name

    def write(self, pointers, n_byte, block):
        name, at = self.locate(pointers, n_byte)
        written, first_read, just_read = self.written[at], self.first_read[at], self.last_read[at] >= self.clock
        # Blocks with fewer numbers than threads are read by several threads, others by those that write them.
        if just_read.any() and block.size >= self.n_thread:
            just_read &= not any(np.array_equal(block, other) for other in self.loaded)
        self.check(name, {
            "written twice, without a barrier": (written >= self.clock).any() or len(np.unique(at)) < len(at),
            "written by two programs": (written > 0) & (written < self.program),
            "written, and another program has read it": (first_read > 0) & (first_read < self.program),
            "written after it was read, without a barrier": just_read,
        })  # fmt: skip
        self.written[at] = self.clock

    def check(self, name, faults):
        for fault, where in faults.items():
            assert not np.any(where), f"{self.kernel}, {name}: {fault}"


class Watch:
    """Stands between kernels and the interpreter, whose functions it replaces by `patch`.

    Attributes:
        reads_unwritten: Whether memory that nothing has written may be read: where no expert computes rows of padding,
            kernels that go over all rows do.
    """

    def __init__(self, patch):
        self.reads_unwritten = False
        for owner, name, function in (
            (GridExecutor, "__call__", self._launch),
            (interpreter, "_implicit_cvt", self._argument),
            (InterpreterBuilder, "set_grid_idx", self._program),
            (InterpreterBuilder, "create_masked_load", self._load),
            (InterpreterBuilder, "create_masked_store", self._store),
            (InterpreterBuilder, "create_barrier", lambda *_: self.launch.pass_barrier()),
            (InterpreterBuilder, "create_atomic_rmw", self._atomic),
            (InterpreterBuilder, "create_atomic_cas", self._atomic),
            (torch, "empty_like", _filled),
            (Tensor, "new_empty", _filled),
        ):
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, of=original, do=function, **k: do(of, *a, **k))

    def _launch(self, run, executor, *arguments, **options):
        self.launch = Launch(executor.fn.__name__, 32 * options["num_warps"])
        run(executor, *arguments, **options)

    def _argument(self, convert, value):
        result = convert(value)
        if isinstance(value, Tensor):
            result.handle.data |= self.launch.add(value)
        return result

    def _program(self, begin, builder, *index):
        self.launch.begin_program()
        begin(builder, *index)

    def _load(self, load, builder, pointers, mask, other, *how):
        dtype, live = interpreter._get_np_dtype(pointers.get_element_ty()), _live(pointers, mask)
        block = pointers.data & ADDRESS
        # The interpreter takes a single `other` that is 0 for none.
        if other is None and block.size > 1:
            unwritten = np.full((*block.shape, dtype.itemsize), UNWRITTEN, dtype=np.uint8)
            other = TensorHandle(unwritten.view(dtype)[..., 0], pointers.get_element_ty())
        name = self.launch.read(pointers.data[live], dtype.itemsize, block) if live.any() else ""
        result = load(builder, TensorHandle(block, pointers.dtype), mask, other, *how)
        if not self.reads_unwritten:
            found = result.data[live][:, None].view(np.uint8)
            self.launch.check(name, {"read, and nothing has written it": (found == UNWRITTEN).all(1)})
        return result

    def _store(self, store, builder, pointers, value, mask, *how):
        dtype, live = interpreter._get_np_dtype(pointers.get_element_ty()), _live(pointers, mask)
        block = pointers.data & ADDRESS
        if live.any():
            self.launch.write(pointers.data[live], dtype.itemsize, block)
        return store(builder, TensorHandle(block, pointers.dtype), value, mask, *how)

    def _atomic(self, *_):
        raise AssertionError(f"{self.launch.kernel}: atomic operations come in any order")


def _live(pointers, mask):
    return np.broadcast_to(mask.data, pointers.data.shape)


def _filled(empty, *arguments, **options):
    result = empty(*arguments, **options)
    if type(result) is Tensor and result.device.type == "cpu":
        result.untyped_storage().fill_(UNWRITTEN)
    return result


@pytest.fixture(autouse=True)
def watch():
    with pytest.MonkeyPatch.context() as patch:
        yield Watch(patch)
