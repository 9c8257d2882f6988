"""The MoE layer against LitGPT's `LLaMAMoE`, the plain loop, the bare matrix products, and dense layers of equal work.

    python benchmarks/moe_layer.py                      # all tables, about five minutes on one core
    python benchmarks/moe_layer.py --precision medium   # float32 products as `torch.set_float32_matmul_precision` says

Everything is measured interleaved in one process, on one thread, in CPU time of the process (other users of the machine
disturb it less than wall-clock time), with new tokens and a new routing for every call, as in training. Each contender
first sees a number of routings: the libraries compile code for the sizes of matrices they meet, and a training run
meets the same sizes again. `LLaMAMoE` and the loop keep meeting new ones.

Shape legend: T tokens, D model width, F hidden width of one expert, E experts, K chosen experts per token.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import litgpt_moe_ext

litgpt_moe_ext.register()

from litgpt import GPT, Config  # noqa: E402
from litgpt.model import LLaMAMLP, LLaMAMoE  # noqa: E402

from litgpt_moe_ext.moe.layer import SharedExpertMoE  # noqa: E402

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Size:
    """A layer and a batch."""

    name: str
    D: int
    F: int
    E: int
    K: int
    T: int

    @property
    def title(self) -> str:
        return f"{self.name}: C{self.D} I{self.F} E{self.E} k{self.K}, {self.T} tokens"

    def config(self, mlp_class_name: str) -> Config:
        return Config(
            n_layer=1,
            n_head=4,
            n_embd=self.D,
            n_expert=self.E,
            n_expert_per_token=self.K,
            moe_intermediate_size=self.F,
            intermediate_size=self.K * self.F,
            bias=False,
            mlp_class_name=mlp_class_name,
        )


SIZES = [
    Size("a", 512, 768, 4, 2, 2048),
    Size("b", 768, 2048, 8, 2, 2048),
    Size("c", 256, 1024, 8, 2, 1080),
    Size("d", 512, 256, 64, 8, 2048),
]


class BareProducts(nn.Module):
    """The limit: the matrix products of the active rows, evenly spread, on memory that is there already."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
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


def contenders(size: Size, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the layers to compare; the two MoE layers of the plugin share their weights."""
    stock = LLaMAMoE(size.config("LLaMAMoE"))
    loop, grouped = (SharedExpertMoE(size.config("SharedExpertMoE")) for _ in range(2))
    for module in (grouped.gate, grouped.experts):
        module.reset_parameters()
    loop.load_state_dict(grouped.state_dict())
    loop.experts.forced_backend = "loop"
    dense = LLaMAMLP(size.config("LLaMAMLP"), size.K * size.F)
    layers = {"LLaMAMoE": stock, "loop": loop, "grouped": grouped, "dense": dense}
    return {name: layer.to(dtype) for name, layer in layers.items()}


def fresh_tokens(size: Size, dtype: torch.dtype) -> Tensor:
    """Return tokens around a random centre, so that each time other experts are more popular."""
    return (torch.randn(1, size.T, size.D) + 0.3 * torch.randn(size.D)).to(dtype)


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    layer(x).backward(upstream)


def measure(size: Size, dtype: torch.dtype, backward: bool, rounds: int, warmup: int) -> dict[str, float]:
    """Return the median CPU seconds of each contender."""
    layers = contenders(size, dtype)
    limit = BareProducts(size, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in (*layers, "limit")}
    for turn in range(warmup + rounds):
        x = fresh_tokens(size, dtype).requires_grad_(backward)
        upstream = torch.randn_like(x)
        for name, layer in layers.items():
            if turn < warmup and name != "grouped" and turn % 8:
                continue
            # As an optimizer with `zero_grad(set_to_none=True)` leaves it.
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


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes kept for the backward pass, each storage once, without parameters and the input itself."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph must live until the sum is taken: freed memory could be handed out twice.
        output = layer(x)
    total = sum(storages.values())
    del output
    return total


def print_times(title: str, rows: list[tuple[str, dict[str, float]]]) -> None:
    print(f"\n{title}")
    print("| case | LLaMAMoE ms | grouped ms | loop | **grouped** | dense | grouped / limit | LLaMAMoE / limit |")
    print("|---|---|---|---|---|---|---|---|")
    for name, t in rows:
        speedups = [f"{t['LLaMAMoE'] / t[k]:.2f}" for k in ("loop", "grouped", "dense")]
        over = [f"{t[k] / t['limit']:.2f}" for k in ("grouped", "LLaMAMoE")]
        times = [f"{1e3 * t[k]:.2f}" for k in ("LLaMAMoE", "grouped")]
        print("| " + " | ".join([name, *times, *speedups, *over]) + " |", flush=True)


def print_saved(sizes: list[Size]) -> None:
    print("\nSaved for the backward pass, MB (and relative to LLaMAMoE)")
    print("| case | LLaMAMoE | loop | grouped | dense |")
    print("|---|---|---|---|---|")
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            x = fresh_tokens(size, dtype).requires_grad_()
            saved = {name: saved_bytes(layer, x) for name, layer in contenders(size, dtype).items()}
            cells = [f"{value / 1e6:.1f} ({value / saved['LLaMAMoE']:.2f})" for value in saved.values()]
            print("| " + " | ".join([f"{size.name} {short(dtype)}", *cells]) + " |", flush=True)


def print_training_step(rounds: int, batch: int = 8, length: int = 256) -> None:
    """A whole optimizer step of the quickstart model: our loop, our grouped experts, LitGPT's layer."""
    settings = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))["model_config"]
    models = {}
    for name in ("loop", "grouped"):
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


def short(dtype: torch.dtype) -> str:
    return "f32" if dtype == torch.float32 else "bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default="abcd", help="which of the sizes a, b, c, d")
    parser.add_argument("--rounds", type=int, default=9, help="measured calls per contender")
    parser.add_argument("--warmup", type=int, default=33, help="calls before, for the grouped path; a few for others")
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(arguments.precision)
    sizes = [size for size in SIZES if size.name in arguments.sizes]
    dtypes = (torch.float32, torch.bfloat16)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, float32 products:", end=" ")
    print(f"{arguments.precision}. Numbers without unit: speed-up over LLaMAMoE, or time over the bare products.")
    for size in sizes:
        print(f"- {size.title}")

    for title, backward in (("Forward and backward", True), ("Forward, no gradients", False)):
        rows = []
        for size in sizes:
            for dtype in dtypes:
                # Without new sizes to compile for, float32 by BLAS needs no long warm-up.
                fixed = dtype == torch.float32 and arguments.precision == "highest"
                warmup = 2 if fixed else arguments.warmup if backward else arguments.warmup // 3
                times = measure(size, dtype, backward, arguments.rounds, warmup)
                rows.append((f"{size.name} {short(dtype)}", times))
        print_times(title, rows)

    rows = []
    for size in sizes:
        for tokens in (1, 8):
            few = Size(size.name, size.D, size.F, size.E, size.K, tokens)
            for dtype in dtypes:
                times = measure(few, dtype, backward=False, rounds=40, warmup=10)
                rows.append((f"{size.name} {short(dtype)}, {tokens} tokens", times))
    print_times("Decoding, no gradients", rows)
    print_saved(sizes)
    print_training_step(arguments.rounds)


if __name__ == "__main__":
    main()
