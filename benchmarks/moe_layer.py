"""The MoE layer against other libraries' (LitGPT, Hugging Face), other implementations, the limit, and dense layers.

    python benchmarks/moe_layer.py                      # all tables, about ten minutes on one core
    python benchmarks/moe_layer.py --precision medium   # float32 products as `torch.set_float32_matmul_precision` says

| contender   | what it is                                                                                |
| ----------- | ----------------------------------------------------------------------------------------- |
| LLaMAMoE    | LitGPT's layer                                                                            |
| HF          | Hugging Face's `MixtralSparseMoeBlock` (eager, the only one in transformers 4.56)         |
| loop        | `SharedExpertMoE` with its reference backend                                              |
| grouped_mm  | `SharedExpertMoE` on `torch.nn.functional.grouped_mm`: sort, gather, multiply, scatter    |
| ours        | `SharedExpertMoE` with the backend it chooses on a CPU                                    |
| dense       | LitGPT's `LLaMAMLP` of the width of K experts: equal active work without routing          |
| limit       | the matrix products of the active rows alone, evenly spread over the experts              |

Everything is measured interleaved in one process, on one thread, in CPU time of the process (which other users of the
machine disturb less than wall-clock time), with new tokens and a new routing for every call, as in training. Each
contender first sees a number of routings, because the libraries compile code for each matrix size, and a training run
meets the same sizes again. The layers without padding keep meeting new ones. The allocator keeps large blocks for all
of them, as it does whenever our layer trains on a CPU (`litgpt_moe_ext.kernels.allocator`).

Shape legend: T tokens, D model width, F hidden width of one expert, E experts, K chosen experts per token.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# oneDNN keeps code for 1024 sizes of matrices. Without more room the contenders would throw out each other's.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import litgpt_moe_ext

litgpt_moe_ext.register()

from gpu_tables.contenders.layers import SIZES, Size  # noqa: E402
from gpu_tables.memory import saved_bytes  # noqa: E402
from litgpt import GPT, Config  # noqa: E402
from litgpt.model import LLaMAMLP, LLaMAMoE  # noqa: E402
from transformers import MixtralConfig  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock  # noqa: E402

from litgpt_moe_ext.kernels.allocator import keep_large_blocks  # noqa: E402
from litgpt_moe_ext.moe.layer import SharedExpertMoE  # noqa: E402

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Case(Size):
    """A layer and the tokens of a batch."""

    T: int


CASES = [Case(*dataclasses.astuple(size), 1080 if size.name == "TinyStories" else 2048) for size in SIZES]


class BareProducts(nn.Module):
    """The limit: the matrix products of the active rows, evenly spread, on preallocated memory."""

    def __init__(self, size: Case, dtype: torch.dtype) -> None:
        super().__init__()
        n = max(1, size.T * size.K // size.E)
        active = min(size.E, size.T * size.K)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape).to(dtype)

        self.x, self.a, self.h = random(n, size.D), random(n, size.F), random(n, 2 * size.F)
        self.gate_up, self.down = random(active, 2 * size.F, size.D), random(active, size.D, size.F)
        self.d_gate_up, self.d_down = torch.empty_like(self.gate_up), torch.empty_like(self.down)

    def forward(self, backward: bool) -> None:
        for gate_up, down, d_gate_up, d_down in zip(self.gate_up, self.down, self.d_gate_up, self.d_down, strict=True):
            torch.mm(self.x, gate_up.t())
            torch.mm(self.a, down.t())
            if backward:
                torch.mm(self.x, down)
                torch.mm(self.x.t(), self.a, out=d_down)
                torch.mm(self.h.t(), self.x, out=d_gate_up)
                torch.mm(self.h, gate_up)


def contenders(size: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the layers to compare."""
    layers: dict[str, nn.Module] = {
        "LLaMAMoE": LLaMAMoE(size.config("LLaMAMoE")),
        "HF": MixtralSparseMoeBlock(
            MixtralConfig(
                hidden_size=size.D, intermediate_size=size.F, num_local_experts=size.E, num_experts_per_tok=size.K
            )
        ),
    }
    for name, backend in (("loop", "loop"), ("grouped_mm", "grouped_mm"), ("ours", None)):
        layers[name] = SharedExpertMoE(size.config("SharedExpertMoE"))
        layers[name].gate.reset_parameters()
        layers[name].experts.reset_parameters()
        layers[name].experts.forced_backend = backend
    layers["dense"] = LLaMAMLP(size.config("LLaMAMLP"), size.K * size.F)
    return {name: layer.to(dtype) for name, layer in layers.items()}


def fresh_tokens(size: Case, dtype: torch.dtype) -> Tensor:
    """Return tokens around a random centre, so that different experts are popular each time."""
    return (torch.randn(1, size.T, size.D) + 0.3 * torch.randn(size.D)).to(dtype)


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    output = layer(x)
    (output[0] if isinstance(output, tuple) else output).backward(upstream)


def measure(size: Case, dtype: torch.dtype, backward: bool, rounds: int, warmup: int) -> dict[str, float]:
    """Return the median CPU seconds of each contender."""
    layers = contenders(size, dtype)
    limit = BareProducts(size, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in (*layers, "limit")}
    for turn in range(warmup + rounds):
        x = fresh_tokens(size, dtype).requires_grad_(backward)
        upstream = torch.randn_like(x)
        for name, layer in layers.items():
            if turn < warmup and name != "ours" and turn % 8:
                continue
            # As after an optimizer's `zero_grad(set_to_none=True)`.
            layer.zero_grad()
            x.grad = None
            if backward:
                taken = cpu_seconds(lambda layer=layer, x=x, dy=upstream: forward_backward(layer, x, dy))
            else:
                taken = cpu_seconds(lambda layer=layer, x=x: forward(layer, x))
            if turn >= warmup:
                seconds[name].append(taken)
        taken = cpu_seconds(lambda: limit(backward))
        if turn >= warmup:
            seconds["limit"].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_times(title: str, rows: Iterable[tuple[str, dict[str, float]]]) -> None:
    print(f"\n{title}")
    speeds = ("HF", "loop", "grouped_mm", "ours", "dense")
    over_limit = ("LLaMAMoE", "ours")
    print(f"| case | LLaMAMoE ms | ours ms | {' | '.join(speeds)} | {' | '.join(f'{k} / limit' for k in over_limit)} |")
    print("|---" * (len(speeds) + len(over_limit) + 3) + "|")
    for name, t in rows:
        speedups = [f"{t['LLaMAMoE'] / t[k]:.2f}" for k in speeds]
        over = [f"{t[k] / t['limit']:.2f}" for k in over_limit]
        times = [f"{1e3 * t[k]:.2f}" for k in ("LLaMAMoE", "ours")]
        print("| " + " | ".join([name, *times, *speedups, *over]) + " |", flush=True)


def print_saved(sizes: list[Case]) -> None:
    print("\nSaved for the backward pass, MB (and relative to LLaMAMoE)")
    print("| case | LLaMAMoE | HF | loop | grouped_mm | ours | dense |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            x = fresh_tokens(size, dtype).requires_grad_()
            saved = {name: saved_bytes(layer, x) for name, layer in contenders(size, dtype).items()}
            cells = [f"{value / 1e6:.1f} ({value / saved['LLaMAMoE']:.2f})" for value in saved.values()]
            print("| " + " | ".join([f"{size.name} {short(dtype)}", *cells]) + " |", flush=True)


def print_training_step(rounds: int, batch: int = 8, length: int = 256) -> None:
    """A whole optimizer step of the quickstart model, with the reference backend and with the chosen one."""
    settings = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))["model_config"]
    models = {}
    for name in ("loop", "ours"):
        torch.manual_seed(0)
        models[name] = GPT(Config(**settings))
        for module in models[name].modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if name == "loop" and hasattr(module, "forced_backend"):
                module.forced_backend = "loop"
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 3):
        ids = torch.randint(0, settings["padded_vocab_size"], (batch, length + 1))
        for name, model in models.items():

            def step(
                model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizers[name], ids: Tensor = ids
            ) -> None:
                F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()

            taken = cpu_seconds(step)
            if turn >= 3:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\nTraining step of configs/quickstart.yaml, {batch} x {length} tokens, float32")
    for name, median in medians.items():
        print(f"- {name}: {1e3 * median:.0f} ms, {medians['loop'] / median:.2f} times the speed of the loop")


def whole_batch(
    size: Case, dtype: torch.dtype, backward: bool, arguments: argparse.Namespace
) -> tuple[str, dict[str, float]]:
    # float32 by BLAS compiles nothing for new sizes, so it needs no long warm-up.
    fixed = dtype == torch.float32 and arguments.precision == "highest"
    warmup = 2 if fixed else arguments.warmup if backward else arguments.warmup // 3
    return f"{size.name} {short(dtype)}", measure(size, dtype, backward, arguments.rounds, warmup)


def decoding(size: Case, tokens: int, dtype: torch.dtype) -> tuple[str, dict[str, float]]:
    few = dataclasses.replace(size, T=tokens)
    return f"{size.name} {short(dtype)}, {tokens}", measure(few, dtype, backward=False, rounds=40, warmup=10)


def short(dtype: torch.dtype) -> str:
    return "f32" if dtype == torch.float32 else "bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [size.name for size in CASES]
    parser.add_argument("--sizes", nargs="+", default=names, choices=names, help="which of the sizes")
    parser.add_argument("--only", choices=["training", "forward", "decoding", "memory", "step"], help="one table only")
    parser.add_argument("--rounds", type=int, default=9, help="measured calls per contender")
    parser.add_argument("--warmup", type=int, default=33, help="calls before, for ours; a few for the others")
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(arguments.precision)
    keep_large_blocks()
    sizes = [size for size in CASES if size.name in arguments.sizes]
    dtypes = (torch.float32, torch.bfloat16)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, float32 products:", end=" ")
    print(f"{arguments.precision}. Numbers without unit: speed-up over LLaMAMoE, or time over the bare products.")
    for size in sizes:
        print(f"- {size.title}, {size.T} tokens")

    def wanted(table: str) -> bool:
        return arguments.only in (None, table)

    for table, title in (("training", "Forward and backward"), ("forward", "Forward, no gradients")):
        if wanted(table):
            print_times(
                title, (whole_batch(size, dtype, table == "training", arguments) for size in sizes for dtype in dtypes)
            )
    if wanted("decoding"):
        print_times("Decoding, no gradients", (decoding(s, n, d) for s in sizes for n in (1, 8) for d in dtypes))
    if wanted("memory"):
        print_saved(sizes)
    if wanted("step"):
        print_training_step(arguments.rounds)


if __name__ == "__main__":
    main()
