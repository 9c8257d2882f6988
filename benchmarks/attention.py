"""The attention layer against PyTorch's stock attention and LitGPT's layer, on one core.

    python benchmarks/attention.py            # all tables, under five minutes
    python benchmarks/attention.py --rounds 5 # quicker, noisier

The contenders of a table take turns, every other round in reverse order. A cell is the median over the rounds of a
ratio within a round, so that other users of the machine disturb both sides of it. Nothing is asserted.
"""

import argparse
import gc
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

import litgpt_moe_ext

litgpt_moe_ext.register()

from litgpt import Config  # noqa: E402
from litgpt.model import CausalSelfAttention  # noqa: E402

from litgpt_moe_ext.attention.causal_attention import causal_attention  # noqa: E402
from litgpt_moe_ext.attention.documents import find_documents  # noqa: E402
from litgpt_moe_ext.attention.layer import SinkAttention  # noqa: E402
from litgpt_moe_ext.attention.rope import build_rope_cache  # noqa: E402
from litgpt_moe_ext.attention.sinks import Softmax  # noqa: E402

H, G, d = 12, 4, 64
SCALE = d**-0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention, without sinks: the baseline of every comparison."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=SCALE)


def contender(sinks: torch.Tensor | None, backend: str | None = None, **pattern: object) -> Attend:
    """Return our attention with fixed settings."""
    softmax = Softmax(sinks, SCALE, backend=backend)
    return lambda q, k, v: causal_attention(q, k, v, softmax, **pattern)


def documents_of(length: int, T: int) -> object:
    """Return documents of `length` tokens in a sequence of T."""
    ends = (torch.arange(1, T + 1) % length == 0).long()
    return find_documents(ends[None], "eos", 1)


def make_inputs(T: int, dtype: torch.dtype, requires_grad: bool) -> list[torch.Tensor]:
    """Return q, k and v of one sequence."""
    return [torch.randn(1, heads, T, d, dtype=dtype).requires_grad_(requires_grad) for heads in (H, G, G)]


def run_forward(attend: Attend, inputs: list[torch.Tensor]) -> None:
    """One forward without gradients."""
    with torch.no_grad():
        attend(*inputs)


def run_training(attend: Attend, inputs: list[torch.Tensor], dout: torch.Tensor) -> None:
    """One forward and backward."""
    attend(*inputs).backward(dout)
    for x in inputs:
        x.grad = None


def ratios(calls: dict[str, Callable[[], None]], rounds: int) -> tuple[float, dict[str, float]]:
    """Time calls in turn.

    Returns:
        Median milliseconds of the first, and for each other call the median over rounds of its time over the first's.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    gc.disable()
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else reversed(calls):
            begin = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - begin)
    gc.enable()
    reference, *others = calls
    by_round = {
        name: statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True)) for name in others
    }
    return statistics.median(times[reference]) * 1e3, by_round


def contenders(T: int) -> dict[str, Attend]:
    """Return the contenders to compare with `sdpa` at T tokens."""
    sinks = torch.zeros(H, requires_grad=True)
    found = {
        "sinks": contender(sinks),
        "no sinks": contender(None),
        "eager sinks": contender(sinks, "eager"),
        "window 128": contender(sinks, window=128),
    }
    for length in (100, 500, 1000):
        if length < T:
            found[f"documents of {length}"] = contender(sinks, documents=documents_of(length, T))
    return found


def print_attention(rounds: int) -> None:
    """Print ratios to SDPA."""
    names = list(contenders(2048))
    # The eager softmax would take most of the table's time.
    skipped = {512: (), 2048: ("eager sinks",)}
    print("## Ratio of time to `F.scaled_dot_product_attention(is_causal=True, enable_gqa=True)`\n")
    print("| T | dtype | pass | SDPA, ms | " + " | ".join(names) + " |")
    print("| --- " * (4 + len(names)) + "|")
    for T in (512, 2048):
        for dtype_name, dtype in DTYPES.items():
            for is_training in (False, True):
                inputs = make_inputs(T, dtype, is_training)
                dout = torch.randn(1, H, T, d, dtype=dtype)
                calls = {}
                for name, attend in {"sdpa": sdpa, **contenders(T)}.items():
                    if name in skipped[T]:
                        continue
                    calls[name] = (
                        partial(run_training, attend, inputs, dout)
                        if is_training
                        else partial(run_forward, attend, inputs)
                    )
                milliseconds, by_name = ratios(calls, rounds * (4 if T == 512 else 1))
                cells = [f"{by_name[name]:.2f}" if name in by_name else "" for name in names]
                label = "fwd+bwd" if is_training else "fwd"
                print(f"| {T} | {dtype_name} | {label} | {milliseconds:.1f} | " + " | ".join(cells) + " |", flush=True)


def make_config(n_query_groups: int, **changes: object) -> Config:
    """Return the configuration of one layer."""
    return Config(
        n_layer=1, n_head=H, n_query_groups=n_query_groups, head_size=d, n_embd=H * d, block_size=2048,
        padded_vocab_size=64, rotary_percentage=1.0, bias=False, **changes,
    )  # fmt: skip


DECODING = """
## Decoding one token, 2048 in the cache: speed-up over LitGPT's `CausalSelfAttention`

"limit" adds up the numbers in the cache and in the weights, and does nothing else: what a layer would reach that only
reads them, once. LitGPT repeats the keys and values of grouped queries, and on a CPU its bf16 kernel is slow for one
query; both can be had back. With as many key/value heads as query heads in fp32 little can be had: LitGPT too reads the
filled part of the cache once, and cannot be beaten by more than the limit without fewer numbers or smaller ones.

| dtype | batch | key/value heads | LitGPT, ms | sinks | no sinks | window 128 | limit |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def read_once(tensors: list[torch.Tensor]) -> None:
    """Read every number of some tensors."""
    for x in tensors:
        # As float32 for any dtype: summing bfloat16 takes longer than reading it.
        x.view(torch.float32).sum()


@torch.inference_mode()
def print_decoding(rounds: int) -> None:
    """Print how much faster one token is decoded than with LitGPT's layer, projections included."""
    S = 2048
    print(DECODING)
    for dtype_name, dtype in DTYPES.items():
        for B in (1, 8):
            for groups in (G, H):
                ours = {"attention_class_name": "SinkAttention"}
                layers = {
                    "litgpt": CausalSelfAttention(make_config(groups), 0),
                    "sinks": SinkAttention(make_config(groups, **ours), 0),
                    "no sinks": SinkAttention(make_config(groups, **ours, attention_sinks=False), 0),
                    "window 128": SinkAttention(make_config(groups, **ours, sliding_window_size=128), 0),
                }
                cos, sin = (table[None, -1:].to(dtype) for table in build_rope_cache(layers["sinks"].config, S))
                position, mask = torch.tensor([S - 1]), torch.ones(1, 1, 1, S, dtype=torch.bool)
                x = torch.randn(B, 1, H * d, dtype=dtype)
                calls = {}
                for name, layer in layers.items():
                    layer.to(dtype).eval()
                    layer.kv_cache = layer.build_kv_cache(B, S, d, dtype=dtype)
                    # Memory never written to is a single page of zeros, read from the L1 cache.
                    layer.kv_cache.k.normal_(), layer.kv_cache.v.normal_()
                    calls[name] = partial(layer, x, cos, sin, mask, position, S)
                cache = layers["sinks"].kv_cache
                calls["limit"] = partial(read_once, [cache.k, cache.v, layer.qkv.weight, layer.proj.weight])
                milliseconds, by_name = ratios(calls, rounds * 2)
                cells = " | ".join(f"{1 / value:.1f}" for value in by_name.values())
                print(f"| {dtype_name} | {B} | {groups} | {milliseconds:.2f} | {cells} |", flush=True)


def peak_mebibytes(name: str) -> float:
    """Return how far one forward and backward at T 2048, float32, raises this process's peak memory."""
    torch.set_num_threads(1)
    T = 2048
    attend = {"sdpa": sdpa, **contenders(T)}[name]
    inputs, dout = make_inputs(T, torch.float32, True), torch.randn(1, H, T, d)
    # A small call first, so that memory kept by the libraries does not count.
    small = make_inputs(64, torch.float32, True)
    run_training(sdpa, small, dout[:, :, :64])
    before = _peak_after_reset()
    run_training(attend, inputs, dout)
    return (_status("VmHWM") - before) / 1024


def _peak_after_reset() -> int:
    # The imports had a higher peak than now; have Linux reset it.
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(field: str) -> int:
    # KiB, as the kernel counts them.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def print_memory() -> None:
    """Print peaks, each from a process of its own."""
    if sys.platform != "linux":
        print("\nPeak memory is read from /proc, which only Linux has.")
        return
    names = ["sdpa", "sinks", "eager sinks", "window 128", "documents of 100", "documents of 1000"]
    print("\n## Peak memory of forward and backward beyond the inputs, T 2048, fp32\n")
    print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
    peaks = []
    for name in names:
        with get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(peak_mebibytes, (name,)))
    print("| " + " | ".join(f"{peak:.0f} MiB" for peak in peaks) + " |")


def describe_machine() -> str:
    """Return machine, versions and commit in one line."""
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return (
        f"{cpu}, one thread, {torch.backends.cpu.get_cpu_capability()}; Python {platform.python_version()}, torch "
        f"{torch.__version__}, commit {commit or 'unknown'}; {H} query heads, {G} key/value heads, head size {d}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds at T 2048; four times as many at T 512")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(describe_machine() + "\n")
    print_attention(args.rounds)
    print_decoding(args.rounds)
    print_memory()


if __name__ == "__main__":
    main()
