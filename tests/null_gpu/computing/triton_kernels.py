"""Triton's kernels by its interpreter, on the memory of the GPU and in blocks of the card's sizes."""

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from tests import quick_interpreter
from tests.null_gpu.computing import capture
from tests.null_gpu.computing.memory import each, flat, on_cpu


def install() -> None:
    """Let the interpreter take tensors of the GPU as they are, and multiply bfloat16."""
    quick_interpreter.install()
    run = interpreter.GridExecutor.__call__

    def call(self, *args, **kwargs):
        # A kernel of torch's own is given what it only reads in a wrapper, which the interpreter does not know.
        args = each(lambda value: getattr(value, "_tensor", value), args)
        on_gpus = [value for value in flat(list(args)) if isinstance(value, Tensor) and value.is_cuda]
        if not on_gpus:
            return run(self, *args, **kwargs)
        # As Triton's launcher says it, which starts kernels on the present device.
        if any(value.device.index != torch.cuda.current_device() for value in on_gpus):
            raise ValueError("Pointer argument cannot be accessed from Triton (it is in the memory of another GPU)")
        given = each(lambda value: on_cpu(value) if isinstance(value, Tensor) else value, args)
        return capture.compute(lambda: run(self, *given, **kwargs))

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        return multiply(self, _wide(a), _wide(b), *rest)

    interpreter.GridExecutor.__call__ = call
    interpreter.InterpreterBuilder.create_dot = create_dot


def _wide(handle):
    # The interpreter keeps bfloat16 as integers, which are the upper halves of float32.
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
