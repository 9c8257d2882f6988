"""How often a GPU reproduces gradients of attention, embedding and RMSNorm bit for bit: python benchmarks/same_bits.py.

The shapes are the quickstart's (4 heads of 32 that share 2, width 128), at 256 tokens and at 2,048.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Gradients = Callable[[], tuple[Tensor, ...]]

KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
HEADS, GROUPS, HEAD_SIZE, WIDTH, VOCABULARY = 4, 2, 32, 128, 2048


def main() -> None:
    """Print how many repetitions equal the first bit for bit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=20)
    repetitions = parser.parse_args().repetitions
    if not torch.cuda.is_available():
        parser.error("torch finds no card")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    cases = {
        f"{k.name.lower()}, {b} x {t} tokens": attention(k, b, t) for b, t in ((8, 256), (4, 2048)) for k in KERNELS
    }
    for name, gradients in {**cases, "embedding": embedding(), "rms_norm": rms_norm()}.items():
        try:
            first = gradients()
            same = sum(all(map(torch.equal, first, gradients())) for _ in range(repetitions))
        except RuntimeError as error:  # a kernel that this card or torch lacks
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        print(f"{name}: the same bits in {same} of {repetitions}")


def attention(kernel: SDPBackend, batch: int, length: int) -> Gradients:
    """Return a function that computes the gradients of queries, keys and values with one kernel."""
    groups = GROUPS if kernel is SDPBackend.CUDNN_ATTENTION else HEADS  # only cuDNN's shares heads itself
    q, k, v, upstream = (
        torch.randn(batch, heads, length, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, groups, groups, HEADS)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]

    def gradients() -> tuple[Tensor, ...]:
        with sdpa_kernel(kernel):
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != HEADS)
        return torch.autograd.grad(output, inputs, upstream)

    return gradients


def embedding() -> Gradients:
    """Return a function that computes the gradient of a table whose rows are read often."""
    table = torch.randn(VOCABULARY, WIDTH, device="cuda", requires_grad=True)
    ids = torch.randint(50, (8, 256), device="cuda")
    upstream = torch.randn(8, 256, WIDTH, device="cuda")
    return lambda: torch.autograd.grad(F.embedding(ids, table), table, upstream)


def rms_norm() -> Gradients:
    """Return a function that computes the gradients of the inputs and of the weights."""
    x, weight = (torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((2048, WIDTH), (WIDTH,)))
    upstream = torch.randn_like(x)
    return lambda: torch.autograd.grad(F.rms_norm(x, (WIDTH,), weight), (x, weight), upstream)


if __name__ == "__main__":
    main()
