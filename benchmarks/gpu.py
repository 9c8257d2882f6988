"""Everything of this package that a card decides, in one command and under eight minutes on any NVIDIA card.

    python benchmarks/gpu.py                      # Markdown on the screen, and gpu-<card>.json
    python benchmarks/gpu.py --only experts steps
    python benchmarks/gpu.py --device cpu --tiny  # the same code at toy sizes, to see that it runs

Tables: experts (forward and backward against LitGPT's `LLaMAMoE`, Hugging Face, Liger where installed, a dense MLP of
equal active work, and bare matrix products), sums of their weights' gradients, their memory, decoding, attention
against `F.scaled_dot_product_attention`, output heads with their losses, whole training steps against their dense twins
(with the device's share, MFU, peak memory, waiting and `torch.compile`), routers, and the memory that a step is
promised to take. Contenders take turns on the same data; a cell is a median. What fails, or does not fit into memory or
time, is left out, and says so; each table has its share of the time, and an error ends no more than its table, in a new
process if the card is lost to this one. The file, which is written anew after every row, holds card, versions and
clocks; send it along with what you report.

Shape legend: T tokens, D model width, F hidden width of one expert, E experts, K chosen experts per token.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import litgpt_moe_ext

litgpt_moe_ext.register()

from lightning.fabric.plugins.precision import Precision  # noqa: E402
from litgpt import GPT, Config  # noqa: E402
from litgpt.model import LLaMAMLP, LLaMAMoE  # noqa: E402
from litgpt.utils import chunked_cross_entropy  # noqa: E402

from litgpt_moe_ext.attention.causal_attention import causal_attention  # noqa: E402
from litgpt_moe_ext.attention.documents import find_documents  # noqa: E402
from litgpt_moe_ext.attention.sinks import Softmax  # noqa: E402
from litgpt_moe_ext.config.fields import added_fields  # noqa: E402
from litgpt_moe_ext.errors import SettingsError  # noqa: E402
from litgpt_moe_ext.inspect.cost.layers import shorten  # noqa: E402
from litgpt_moe_ext.inspect.cost.memory import Step, training_memory  # noqa: E402
from litgpt_moe_ext.kernels.launch import triton_works_on  # noqa: E402
from litgpt_moe_ext.loss.cross_entropy import has_kernel, mean_cross_entropy  # noqa: E402
from litgpt_moe_ext.loss.linear import linear_loss, product_dtype  # noqa: E402
from litgpt_moe_ext.model_size import count_flops  # noqa: E402
from litgpt_moe_ext.moe.gradient_injection import remember_scale  # noqa: E402
from litgpt_moe_ext.moe.kernels import native, router_product  # noqa: E402
from litgpt_moe_ext.moe.kernels.plan import Outer, plan_of  # noqa: E402
from litgpt_moe_ext.moe.layer import SharedExpertMoE  # noqa: E402
from litgpt_moe_ext.rows import Rows  # noqa: E402
from litgpt_moe_ext.training.callbacks.telemetry import peak_flops  # noqa: E402
from litgpt_moe_ext.training.optim.largest_first import step_largest_first  # noqa: E402
from litgpt_moe_ext.training.steps.graphed_loss import GraphedLoss  # noqa: E402
from litgpt_moe_ext.training.steps.half_logits import loss_of_logits  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Cycles of the device's clock before what is measured "ahead", 8 to 10 ms.
_HEAD_START = 16_000_000
RECIPES = ("quickstart", "code-moe-60m", "moe-200m-tinystories")
BACKENDS = ("triton", "grouped_mm", "loop")


@dataclasses.dataclass(frozen=True)
class Size:
    """An MoE layer."""

    name: str
    D: int
    F: int
    E: int
    K: int

    def config(self, mlp_class_name: str, **changes: Any) -> Config:
        sizes = {"n_embd": self.D, "n_expert": self.E, "n_expert_per_token": self.K, "moe_intermediate_size": self.F}
        fixed = {"n_layer": 1, "n_head": 4, "bias": False, "intermediate_size": self.K * self.F}
        return Config(**sizes, **fixed, mlp_class_name=mlp_class_name, **changes)


# As in `benchmarks/moe_layer.py`.
SIZES = [
    Size("60M: D512 F768 E4 k2", 512, 768, 4, 2),
    Size("200M: D768 F2048 E8 k2", 768, 2048, 8, 2),
    Size("TinyStories: D256 F1024 E8 k2", 256, 1024, 8, 2),
    Size("fine-grained: D512 F256 E64 k8", 512, 256, 64, 8),
]
TINY = [Size("tiny: D64 F32 E4 k2", 64, 32, 4, 2)]


class Bench:
    """Where and how long to measure.

    Args:
        device: Where.
        tiny: Whether to take toy sizes.
        minutes: After which nothing new is begun.
    """

    def __init__(self, device: str, tiny: bool, minutes: float) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.end = self.end_of_table = time.monotonic() + 60 * minutes
        self.is_cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16
        if self.is_cuda and torch.cuda.get_device_capability() < (8, 0):
            self.dtype = torch.float16
        self.rounds = 3 if tiny else 9
        self.tables: list[dict[str, Any]] = []
        self.notes: list[str] = []

    @property
    def late(self) -> bool:
        return time.monotonic() > min(self.end, self.end_of_table)

    def note(self, text: str) -> None:
        """Say what is missing from a table, and keep it for the file."""
        print(f"({text})", flush=True)
        self.notes.append(text)

    def medians(self, calls: dict[str, Callable[[], object]], ahead: bool = False) -> dict[str, float | None]:
        """Return the median milliseconds of calls that take turns; None for those that fail.

        Args:
            calls: What to measure.
            ahead: Whether the host has a head start, as in a training step, where it is layers ahead of the device.
                Then only those who wait for the device are measured with the host's time.
        """
        times: dict[str, list[float]] = {}
        for name, call in calls.items():
            if self.works(name, call):
                call()
                times[name] = []
        for turn in range(self.rounds):
            for name in list(times) if turn % 2 == 0 else reversed(list(times)):
                times[name].append(self._milliseconds(calls[name], ahead))
            # Two of each are enough to go on with.
            if self.late and turn:
                break
        return {name: statistics.median(times[name]) if name in times else None for name in calls}

    def works(self, name: str, call: Callable[[], object]) -> bool:
        """Return whether a contender works at all, and note why not; others' layers may want other versions."""
        try:
            call()
            if self.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            self.note(f"{name} is left out: {described(error)}")
            return False
        return True

    def host_ms(self, call: Callable[[], object]) -> float | None:
        """Return how long the host takes to start a call, milliseconds; None without a device."""
        if not self.is_cuda:
            return None
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def _milliseconds(self, call: Callable[[], object], ahead: bool) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(_HEAD_START)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def table(self, name: str, title: str, rows: Iterator[dict[str, Any]], save: Callable[[], None]) -> None:
        """Print a table row by row as it is measured, and save what there is after each; an error ends the table only.

        Args:
            name: Of the table.
            title: Its heading.
            rows: What to measure.
            save: Writes the file.
        """
        kept: list[dict[str, Any]] = []
        self.notes = []
        self.tables.append({"name": name, "title": title, "rows": kept, "notes": self.notes})
        print(f"\n## {title}\n")
        try:
            for row in rows:
                if not kept:
                    print("| " + " | ".join(row) + " |\n" + "| --- " * len(row) + "|")
                print("| " + " | ".join(cell(value) for value in row.values()) + " |", flush=True)
                kept.append(row)
                save()
                if self.is_cuda:
                    gc.collect()
                    torch.cuda.empty_cache()
                if self.late:
                    self.note("out of time: the rest is left out")
                    break
        except Exception as error:
            traceback.print_exc()
            self.note(f"the rest is left out: {described(error)}")
        save()

    def context_is_lost(self) -> bool:
        """Return whether the card works no longer for this process, as after an access to a wrong address."""
        if not self.is_cuda:
            return False
        try:
            torch.cuda.synchronize()
            torch.ones(1, device=self.device).sum().item()
        except torch.OutOfMemoryError:
            return False
        except Exception as error:
            print(f"(the card is lost to this process: {described(error)})", flush=True)
            return True
        return False


def described(error: Exception) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def environment(bench: Bench) -> dict[str, Any]:
    """Return what a figure depends on."""
    versions = {name: importlib.util.find_spec(name) is not None for name in ("flash_attn", "liger_kernel")}
    found = {"python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if bench.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
            found |= dict(zip(query.split(","), answer.strip().split(", "), strict=False))
    return found | versions


def make_layers(size: Size, bench: Bench) -> dict[str, nn.Module]:
    """Return our layer with every backend that works here, and those to compare it with."""
    layers: dict[str, nn.Module] = {}
    for backend in BACKENDS:
        with contextlib.suppress(SettingsError):
            layers[backend] = make_layer(size, bench, backend)
    layers["LLaMAMoE"] = LLaMAMoE(size.config("LLaMAMoE"))
    with contextlib.suppress(ImportError):
        layers["HF"] = hugging_face_layer(size)
    if importlib.util.find_spec("liger_kernel") is not None:
        layers["Liger"] = Liger(layers[next(iter(layers))])
    layers["dense"] = LLaMAMLP(size.config("LLaMAMLP"), size.K * size.F)
    return {name: layer.to(bench.device, bench.dtype) for name, layer in layers.items()}


def make_layer(size: Size, bench: Bench, backend: str) -> nn.Module:
    """Return our layer with a backend; raises SettingsError where it does not work."""
    moe = SharedExpertMoE(size.config("SharedExpertMoE", expert_backend=backend))
    moe.experts.backend_for(torch.empty(1, size.D, device=bench.device, dtype=bench.dtype))
    moe.gate.reset_parameters()
    moe.experts.reset_parameters()
    return moe.to(bench.device, bench.dtype)


def hugging_face_layer(size: Size) -> nn.Module:
    """Return Mixtral's layer; from transformers 5 on with the experts in grouped products, as its models have them."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    names = {"num_local_experts": size.E, "num_experts_per_tok": size.K}
    config = MixtralConfig(hidden_size=size.D, intermediate_size=size.F, **names)
    config._experts_implementation = "grouped_mm"
    layer = MixtralSparseMoeBlock(config)
    # A layer without its model is not initialized, and would route by what its memory held before.
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


class Liger(nn.Module):
    """Liger's fused experts behind our router."""

    def __init__(self, moe: SharedExpertMoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BTD: Tensor) -> Tensor:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        x_TD = x_BTD.flatten(0, 1)
        routing, weights = self.moe.gate(x_TD), self.moe.experts.weights
        chosen = (routing.experts_TK, routing.weights_TK.to(x_TD.dtype))
        arguments = (x_TD, weights.up_EGD, weights.down_EDF, *chosen)
        return LigerFusedMoEFunction.apply(*arguments).view(x_BTD.shape)


def bare_products(size: Size, T: int, bench: Bench) -> Callable[[], None]:
    """Return the matrix products of the active rows alone, evenly spread over the experts."""
    n = max(1, T * size.K // size.E)
    random = partial(torch.randn, device=bench.device, dtype=bench.dtype)
    x, a, h = random(size.E, n, size.D), random(size.E, n, size.F), random(size.E, n, 2 * size.F)
    up, down = random(size.E, 2 * size.F, size.D), random(size.E, size.D, size.F)

    def run() -> None:
        torch.bmm(x, up.mT)
        torch.bmm(a, down.mT)
        torch.bmm(x, down)
        torch.bmm(x.mT, a)
        torch.bmm(h.mT, x)
        torch.bmm(h, up)

    return run


def compile_kernels(job: tuple[Size | str, torch.dtype]) -> None:
    """Compile what a layer or the step of a recipe needs, for the cache on the disk that other processes read."""
    bench = Bench("cuda", False, 1.0)
    bench.dtype = job[1]
    if isinstance(job[0], Size):
        size = job[0]
        for T in (8, 2048, 16384):
            x = torch.randn(1, T, size.D, device=bench.device, dtype=bench.dtype).requires_grad_()
            layer = make_layer(size, bench, "triton")
            forward_backward(layer, x)
            with torch.no_grad():
                layer(x)
    else:
        settings, micro_batch, _ = recipe(job[0], bench.tiny)
        size = (1, micro_batch, settings["block_size"] + 1)
        Trainee(settings, bench, torch.randint(0, settings["vocab_size"], size, device=bench.device)).step()
    torch.cuda.synchronize()


def warm_up(bench: Bench) -> None:
    """Compile Triton's kernels on all cores first; one after the other they would take most of the time there is."""
    import multiprocessing

    jobs = [(thing, bench.dtype) for thing in (*SIZES, *RECIPES)]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        for job in [pool.apply_async(compile_kernels, (job,)) for job in jobs]:
            # Whatever fails here fails again, and is reported, where it is measured.
            with contextlib.suppress(Exception):
                job.get(timeout=90)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(x.detach())


def experts_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    lengths = (64,) if bench.tiny else (16384, 2048, 65536)
    for T in lengths:
        for size in TINY if bench.tiny else SIZES:
            layers = make_layers(size, bench)
            x = torch.randn(1, T, size.D, device=bench.device, dtype=bench.dtype).requires_grad_()
            calls = {name: partial(forward_backward, layer, x) for name, layer in layers.items()}
            times = bench.medians({**calls, "products": bare_products(size, T, bench)}, ahead=True)
            names = (*BACKENDS, "LLaMAMoE", "HF", "Liger", "dense", "products")
            best = min((times[name] for name in BACKENDS[:2] if times.get(name)), default=None)
            ratios = {
                f"{name} / ours": times[name] / best if best and times.get(name) else None
                for name in ("LLaMAMoE", "grouped_mm", "dense", "products")
            }
            host = {f"host, {name}": bench.host_ms(calls[name]) for name in (next(iter(calls)), "dense")}
            yield {"layer": size.name, "tokens": T, **{f"{n}, ms": times.get(n) for n in names}, **ratios, **host}


def gradient_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Measure gradients of first projections that come to another's: added by the product, and by autograd after it."""
    engines: dict[str, Any] = {"torch": native}
    if bench.is_cuda and triton_works_on(bench.device):
        from litgpt_moe_ext.moe.kernels import triton

        engines = {"triton": triton, **engines}
    for T in (64,) if bench.tiny else (16384, 2048):
        for size in TINY if bench.tiny else SIZES:
            n_row = T * size.K
            rows_R = torch.randperm(n_row, device=bench.device)
            ends_E = torch.arange(1, size.E + 1, device=bench.device, dtype=torch.int32) * (n_row // size.E)
            x = torch.randn(T, size.D, device=bench.device, dtype=bench.dtype)
            dh = torch.randn(n_row, 2 * size.F, device=bench.device, dtype=bench.dtype)
            outer = Outer(dh, x, plan_of(rows_R, ends_E, T), gather_right=True)
            total = torch.zeros(size.E, 2 * size.F, size.D, device=bench.device)
            calls: dict[str, Callable[[], object]] = {}
            for name, engine in engines.items():
                multiply = engine.sum_outer_products
                calls[f"{name}, ms"] = partial(multiply, outer, torch.float32, total)
                calls[f"{name} and autograd, ms"] = lambda m=multiply, o=outer, t=total: t.add_(m(o, torch.float32))
            chosen = "torch" if native.sums_fast(outer) else next(iter(engines))
            yield {"layer": size.name, "tokens": T, "chosen": chosen, **bench.medians(calls, ahead=True)}


def router_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Measure routers by the fused kernels and by torch's operators, which start some forty kernels."""
    T, D = (64, 64) if bench.tiny else (16384, 768)
    settings: dict[str, dict[str, Any]] = {
        "sigmoid, bias": {"router_score_function": "sigmoid", "norm_topk_prob": True, "router_bias_update_rate": 0.001},
        "softmax, balancing loss": {"router_score_function": "softmax", "router_load_balancing_loss_coef": 0.01},
        "noisy, two losses": {"router_type": "noisy_topk"},
    }
    # From 128 experts on several programs add up what the others decided.
    for (rule, changes), E in itertools.product(settings.items(), (8,) if bench.tiny else (64, 128, 512)):
        x = torch.randn(T, D, device=bench.device, dtype=bench.dtype).requires_grad_()
        row: dict[str, Any] = {"router": rule, "tokens": T, "experts": E}
        gates = {}
        for name, backend in (("fused, ms", None), ("operators, ms", "loop")):
            size = Size("", D, 32, E, 2)
            gate = SharedExpertMoE(size.config("SharedExpertMoE", expert_backend=backend, **changes)).gate
            gate.reset_parameters()
            gates[name] = gate.to(bench.device)

        def run(gate: nn.Module, x: Tensor = x) -> None:
            gate.zero_grad()
            gate(x).weights_TK.sum().backward()

        row |= bench.medians({name: partial(run, gate) for name, gate in gates.items()}, ahead=True)
        fused, plain = row["fused, ms"], row["operators, ms"]
        yield row | {"operators / fused": plain / fused if plain and fused else None}


def product_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Measure a router's product by the package's kernel and by torch, and the error of the weights' gradient."""
    T, D = (64, 64) if bench.tiny else (16384, 768)
    for E in (8, 64):
        for dtype in dict.fromkeys((bench.dtype, torch.float32)):
            x = torch.randn(T, D, device=bench.device, dtype=dtype).requires_grad_()
            upstream = torch.randn(T, E, device=bench.device)
            gate = SharedExpertMoE(Size("", D, 32, E, 2).config("SharedExpertMoE", expert_backend="loop")).gate
            gate.reset_parameters()
            gate.to(bench.device)
            # Ours needs a card.
            products = {"ours": router_product.project if bench.is_cuda else gate.project, "torch": gate.project}
            row: dict[str, Any] = {"tokens": T, "width": D, "experts": E, "of": str(dtype).removeprefix("torch.")}
            for what in ("forward", "both"):

                def run(product: Callable[..., Tensor], backward: bool = what == "both", x: Tensor = x) -> None:
                    logits = product(x, gate.weight)  # noqa: B023
                    if backward:
                        torch.autograd.grad(logits, (x, gate.weight), upstream)  # noqa: B023

                calls = {f"{what}, {name}, ms": partial(run, product) for name, product in products.items()}
                times = bench.medians(calls, ahead=True)
                ours, theirs = times.values()
                row |= times | {f"{what}, torch / ours": theirs / ours if ours and theirs else None}
            exact = upstream.double().t() @ x.detach().double()
            for name, product in products.items():
                if row[f"both, {name}, ms"] is not None:
                    (dweight,) = torch.autograd.grad(product(x, gate.weight), gate.weight, upstream)
                    row[f"error, {name}"] = ((dweight - exact).abs().max() / exact.abs().max()).item()
                else:
                    row[f"error, {name}"] = None
            yield row


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes kept for the backward pass, each storage once, without parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    total = sum(storages.values())
    del output
    return total


def memory_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    T = 64 if bench.tiny else 16384
    for size in TINY if bench.tiny else SIZES:
        x = torch.randn(1, T, size.D, device=bench.device, dtype=bench.dtype).requires_grad_()
        row: dict[str, Any] = {"layer": size.name, "tokens": T}
        for name, layer in make_layers(size, bench).items():
            if name in ("triton", "grouped_mm", "LLaMAMoE", "dense"):
                row[f"{name}, MB"] = saved_bytes(layer, x) / 1e6
        yield row


def decoding_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    for T in (1, 8):
        for size in TINY if bench.tiny else SIZES:
            x = torch.randn(1, T, size.D, device=bench.device, dtype=bench.dtype)

            def decode(layer: nn.Module, x: Tensor = x) -> None:
                with torch.no_grad():
                    layer(x)

            calls = {name: partial(decode, layer) for name, layer in make_layers(size, bench).items()}
            times = bench.medians(calls)
            yield {"layer": size.name, "tokens": T, **{f"{name}, ms": value for name, value in times.items()}}


def attention_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    H, G, D = 12, 4, 64
    for T in (64,) if bench.tiny else (1024, 4096):
        for backward in (False, True):
            q, k, v = (
                torch.randn(4, n, T, D, device=bench.device, dtype=bench.dtype).requires_grad_(backward)
                for n in (H, G, G)
            )
            sinks = torch.zeros(H, device=bench.device).requires_grad_(backward)
            # As a loader hands them out, and Fabric moves them.
            ends = (torch.arange(1, T + 2) % (T // 4) == 0).long().expand(4, -1).as_subclass(Rows)
            ids = ends.to(bench.device)[:, :T]
            patterns = {
                "sinks": (sinks, {}),
                "no sinks": (None, {}),
                "window": (sinks, {"window": T // 8}),
                "documents": (sinks, {"documents": find_documents(ids, "eos", 1)}),
            }

            def run(attend: Callable[[], Tensor], backward: bool = backward) -> None:
                with torch.set_grad_enabled(backward):
                    y = attend()
                    if backward:
                        y.backward(y.detach())

            sdpa = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            calls: dict[str, Callable[[], object]] = {"SDPA": partial(run, sdpa)}
            for name, (sink, pattern) in patterns.items():
                calls[name] = partial(run, partial(causal_attention, q, k, v, Softmax(sink, D**-0.5), **pattern))
            times = bench.medians(calls, ahead=True)
            over = {f"{n} / SDPA": t / times["SDPA"] for n, t in times.items() if n != "SDPA" and t and times["SDPA"]}
            kind = "forward and backward" if backward else "forward"
            yield {"tokens": T, "pass": kind, "SDPA, ms": times["SDPA"], **over}


# Output heads of the recipes: tokens of a micro-batch, model width, vocabulary.
HEADS = {
    "quickstart": (2048, 128, 2048),
    "code-moe-60m": (16384, 512, 49152),
    "moe-200m-tinystories": (8192, 768, 32000),
    "gpt-moe-fineweb": (8192, 768, 50304),
}


def loss_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Output head and loss, both passes: LitGPT's, torch's at once, Liger's where installed, ours, and ours fused."""
    for name, (T, D, V) in {"tiny": (96, 32, 100)}.items() if bench.tiny else HEADS.items():
        head = nn.Linear(D, V, bias=False, device=bench.device)
        x_TD = torch.randn(T, D, device=bench.device, requires_grad=True)
        targets_T = torch.randint(V, (T,), device=bench.device)
        half = [torch.randn(size, device=bench.device, dtype=bench.dtype) for size in ((T, D), (V, D), (T, V))]
        losses = contending_losses(head, targets_T, bench)
        calls: dict[str, Callable[[], object]] = {
            kind: partial(loss_and_gradient, loss, head, x_TD, bench) for kind, loss in losses.items()
        }
        peaks = {kind: peak_mb(call, bench) for kind, call in calls.items()}
        calls["products"] = partial(products_of_a_head, *half)
        times = bench.medians(calls, ahead=True)
        ours, litgpt = times.get("ours"), times["LitGPT"]
        yield {
            "recipe": name, "tokens": T, "vocabulary": V,
            **{f"{kind}, ms": times.get(kind) for kind in ("LitGPT", "torch", "Liger", "ours", "fused", "products")},
            "LitGPT / ours": litgpt / ours if litgpt and ours else None,
            **{f"{kind}, MB": peaks.get(kind) for kind in ("LitGPT", "ours", "fused")},
        }  # fmt: skip


def contending_losses(head: nn.Linear, targets_T: Tensor, bench: Bench) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what makes a mean loss of the input of an output head, under autocast."""
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        # As Fabric hands logits on.
        "LitGPT": lambda x_TD: chunked_cross_entropy(head(x_TD).float(), targets_T),
        "torch": lambda x_TD: nn.functional.cross_entropy(head(x_TD).float(), targets_T),
    }
    if importlib.util.find_spec("liger_kernel") is not None and bench.is_cuda:
        from liger_kernel.transformers.functional import liger_cross_entropy

        losses["Liger"] = lambda x_TD: liger_cross_entropy(head(x_TD), targets_T)
    if has_kernel(head.weight.detach(), targets_T):
        losses["ours"] = lambda x_TD: mean_cross_entropy(head(x_TD), targets_T)
    if hasattr(nn.functional, "linear_cross_entropy"):
        losses["fused"] = lambda x_TD: linear_loss(x_TD, targets_T, head, product_dtype(x_TD))
    return losses


def loss_and_gradient(loss: Callable[[Tensor], Tensor], head: nn.Linear, x_TD: Tensor, bench: Bench) -> None:
    """Run both passes of an output head and its loss."""
    with torch.autocast(bench.device.type, bench.dtype):
        value = loss(x_TD)
    torch.autograd.grad(value, [x_TD, head.weight])


def products_of_a_head(x_TD: Tensor, weight_VD: Tensor, grad_TV: Tensor) -> None:
    """Multiply as an output head does in both passes, and nothing else."""
    x_TD @ weight_VD.t()
    grad_TV @ weight_VD
    grad_TV.t() @ x_TD


def peak_mb(call: Callable[[], object], bench: Bench) -> float | None:
    """Return how much memory a call needs beside what is there, MB; None without a card, or if it fails."""
    if not bench.is_cuda:
        return None
    try:
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
    except Exception:  # said where the call is measured
        return None
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _litgpts_loss(logits: Tensor, targets: Tensor) -> Tensor:
    # Marked, as training marks its loss: routers need not ask what a loss nobody scales is scaled by.
    return remember_scale(chunked_cross_entropy(logits, targets, chunk_size=0))


# That of training, which has the kernel where it works. Nothing here converts logits for LitGPT's.
_cross_entropy = loss_of_logits(_litgpts_loss, Precision())


class Trainee:
    """A model in training, one optimizer step at a time.

    Args:
        settings: Fields of its configuration.
        bench: Where.
        batches: Token ids of the micro-batches of a step, (A, B, T + 1).
        how: eager, compiled, graphs, "graphs, unshared", whose micro-batches share nothing of the experts' weights, or
            "graphs, one stream", in which no parts of layers run side by side.
    """

    def __init__(self, settings: dict[str, Any], bench: Bench, batches: Tensor, how: str = "eager") -> None:
        torch.manual_seed(0)
        self.config, self.batches = Config(**settings), batches
        with bench.device:
            model = GPT(self.config)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.autocast = partial(torch.autocast, bench.device.type, bench.dtype)
        if how == "compiled":
            # Otherwise the sizes of the next recipe would be taken for ones that change from step to step.
            torch._dynamo.reset()
        self.model = torch.compile(model) if how == "compiled" else model
        self.loss = self.plain_loss
        graphs = how.startswith("graphs") and bench.is_cuda
        if graphs:
            self.loss = GraphedLoss(self.plain_loss, model, careful=True, say=partial(note_if_off, bench))
            if how == "graphs, unshared":
                self.loss.sharing = contextlib.nullcontext
            if how == "graphs, one stream":
                self.loss.abreast = contextlib.nullcontext
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        step_largest_first(self.optimizer)

        # The first steps run as they are, then passes are captured.
        for _ in range(3 if graphs else 0):
            self.step()

    def plain_loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with self.autocast():
            return _cross_entropy(self.model(ids), targets)

    def step(self) -> None:
        for batch in self.batches:
            (self.loss(batch[:, :-1], batch[:, 1:].contiguous()) / len(self.batches)).backward()
        # The optimizer's, as Fabric takes: to look for those of a model takes the host longer the more modules it has.
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def note_if_off(bench: Bench, text: str) -> None:
    """Note that CUDA graphs were not used."""
    if ": off" in text:
        bench.note(text)


def contenders(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the model of a recipe, the same with LitGPT's `LLaMAMoE`, and its dense twin of equal active work."""
    ours = Config(**settings)
    groups = ("n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "rope_adjustments")
    experts = ("n_expert", "n_expert_per_token", "n_shared_expert", "norm_topk_prob", "routed_scaling_factor")
    plain = {name: value for name, value in settings.items() if name not in (*added_fields(), *groups)}
    width = (ours.n_expert_per_token + (ours.n_shared_expert or 0)) * ours.moe_intermediate_size
    # The twin keeps our attention, so that the experts are all that differs.
    kept = {name: value for name, value in settings.items() if "attention" in name or name not in added_fields()}
    dense = {n: v for n, v in kept.items() if n not in (*experts, *groups[:3], "moe_intermediate_size")}
    dense.pop("first_k_dense_replace", None)
    return {
        "ours": settings,
        "LLaMAMoE": {**plain, "mlp_class_name": "LLaMAMoE"},
        "dense twin": {**dense, "mlp_class_name": "LLaMAMLP", "intermediate_size": width},
    }


def waits(step: Callable[[], None], bench: Bench) -> str:
    """Return whether the host waits for the device in a step."""
    if not bench.is_cuda:
        return "-"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return "yes"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def recipe(name: str, tiny: bool) -> tuple[dict[str, Any], int, int]:
    """Return the model of a recipe, its micro-batch, and how many of these a step has on one card, at most four."""
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    settings, train = content["model_config"], content["train"]
    if tiny:
        settings |= {"n_layer": 1, "n_embd": 64, "block_size": 64, "moe_intermediate_size": 32, "vocab_size": 128}
        settings |= {"padded_vocab_size": 128, "first_k_dense_replace": None, "intermediate_size": 64}
        settings |= {"n_head": 4, "n_query_groups": 2, "head_size": 16}
    micro_batches = min(train["global_batch_size"] // train["micro_batch_size"], 4)
    return settings, 1 if tiny else train["micro_batch_size"], micro_batches


def steps_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    graphs = ("dense twin, graphs", "ours, graphs", "ours, graphs, unshared", "ours, graphs, one stream")
    return measured_steps(bench, (*graphs, "dense twin", "ours", "LLaMAMoE"))


def compiled_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    return measured_steps(bench, () if bench.tiny else ("dense twin, compiled", "ours, compiled"))


def measured_steps(bench: Bench, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Measure whole training steps of recipes with the models of these `names`, each dense twin before its rivals."""
    for recipe_name in RECIPES[:1] if bench.tiny else RECIPES:
        settings, micro_batch, accumulation = recipe(recipe_name, bench.tiny)
        length = settings["block_size"]
        size = (accumulation, micro_batch, length + 1)
        batches = torch.randint(0, settings["vocab_size"], size, device=bench.device)
        reference = device_reference = None
        for name in names:
            if bench.late:
                return
            if bench.is_cuda:
                # What the last model kept is not this one's.
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            row: dict[str, Any] = {
                "recipe": recipe_name, "batch": f"{accumulation} x {micro_batch} x {length}", "model": name
            }  # fmt: skip
            model, _, how = name.partition(", ")
            try:
                trainee = Trainee(contenders(settings)[model], bench, batches, how or "eager")
                time_ms, device_ms = step_times(bench, f"{recipe_name}, {name}", trainee, how.startswith("graphs"))
            except Exception as error:
                bench.note(f"{recipe_name}, {name} is left out: {described(error)}")
                continue
            if model == "dense twin":
                reference, device_reference = time_ms, device_ms
            tokens = accumulation * micro_batch * length
            flops = accumulation * micro_batch * count_flops(trainee.config, length, training=True)
            precision = "16-mixed" if bench.dtype == torch.float16 else "bf16-mixed"
            peak = peak_flops(torch.cuda.get_device_name(), precision, "ieee") if bench.is_cuda else None
            yield row | {
                "ms per step": time_ms,
                "time / dense twin": time_ms / reference if time_ms and reference else None,
                "device, ms": device_ms,
                "device / dense twin": device_ms / device_reference if device_ms and device_reference else None,
                "tokens per second": tokens / time_ms * 1e3 if time_ms else None,
                "MFU": flops / time_ms * 1e3 / peak if time_ms and peak else None,
                "TFLOP/s": flops / time_ms * 1e-9 if time_ms else None,
                "peak GiB": torch.cuda.max_memory_reserved() / 2**30 if bench.is_cuda else None,
                "waits": waits(trainee.step, bench) if time_ms else None,
            }
            del trainee


def step_times(bench: Bench, name: str, trainee: Trainee, graphs: bool) -> tuple[float | None, float | None]:
    """Return the milliseconds of a step and, with CUDA graphs, of the device's part; None for what fails."""
    call = {name: trainee.step}
    (time_ms,) = bench.medians(call).values()
    if time_ms is None or not graphs:
        return time_ms, None
    # Of a small model's step the host takes longer than the device.
    (device_ms,) = bench.medians(call, ahead=True).values()
    return time_ms, device_ms


def promise_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Compare the memory that `litgpt-moe doctor` predicts with what a step takes."""
    for name in RECIPES[:1] if bench.tiny else RECIPES:
        settings, micro_batch, _ = recipe(name, bench.tiny)
        length = settings["block_size"]
        step = Step("bf16-mixed", micro_batch, length, kernel_loss=bench.is_cuda and triton_works_on(bench.device))
        predicted = training_memory(shorten(Config(**settings)), step).total / 2**30
        measured = None
        if bench.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            batch = torch.randint(0, settings["vocab_size"], (1, micro_batch, length + 1), device=bench.device)
            with contextlib.suppress(torch.OutOfMemoryError):
                trainee = Trainee(settings, bench, batch)
                trainee.step()
                trainee.step()
                measured = torch.cuda.max_memory_allocated() / 2**30
                del trainee
        yield {"recipe": name, "batch": micro_batch, "predicted GiB": predicted, "measured GiB": measured}


# Their titles, and their shares of the time.
TABLES = {
    "experts": ("Experts, forward and backward", 4.0, experts_rows),
    "gradients": ("Gradients of weights, added up", 0.4, gradient_rows),
    "router": ("Routers, forward and backward", 0.5, router_rows),
    "router_product": ("Routers' products", 0.6, product_rows),
    "loss": ("Output head and loss, forward and backward", 0.5, loss_rows),
    "steps": ("Whole training steps", 5.0, steps_rows),
    "attention": ("Attention against SDPA", 1.0, attention_rows),
    "decoding": ("Decoding, no gradients", 0.5, decoding_rows),
    "memory": ("Saved for the backward pass", 0.5, memory_rows),
    "promise": ("Memory of a training step", 0.5, promise_rows),
    "compiled": ("Whole training steps, compiled", 2.0, compiled_rows),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="some of the tables")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, help="file for the figures (default: gpu-<card>.json)")
    parser.add_argument("--resume", action="store_true", help="keep the tables that the file has, and measure the rest")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: cuda must be there, torch finds no card; --device cpu --tiny tries the code")
    bench = Bench(arguments.device, arguments.tiny, arguments.minutes)
    found = environment(bench)
    card = "".join(letter if letter.isalnum() else "-" for letter in found.get("card", "cpu"))
    out = arguments.out or Path(f"gpu-{card}.json")
    if arguments.resume and out.is_file():
        bench.tables = json.loads(out.read_text(encoding="utf-8"))["tables"]

    def save() -> None:
        new = out.with_name(out.name + ".new")
        new.write_text(json.dumps({"environment": found, "tables": bench.tables}, indent=1), encoding="utf-8")
        new.replace(out)

    print("# " + found.get("card", "CPU") + "\n\n" + "\n".join(f"- {name}: {value}" for name, value in found.items()))
    if bench.is_cuda and not arguments.resume:
        warm_up(bench)
    have = {table["name"] for table in bench.tables}
    names = [name for name in arguments.only if name not in have]
    for i, name in enumerate(names):
        title, share, rows = TABLES[name]
        now = time.monotonic()
        bench.end_of_table = now + (bench.end - now) * share / sum(TABLES[later][1] for later in names[i:])
        if not bench.late:
            bench.table(name, f"{title} ({str(bench.dtype).removeprefix('torch.')})", rows(bench), save)
        if names[i + 1 :] and bench.context_is_lost():
            # A new process has a new context.
            minutes = (bench.end - time.monotonic()) / 60
            rest = ["--resume", "--minutes", f"{minutes:.2f}", "--out", str(out), "--device", arguments.device]
            rest += [*(["--tiny"] if arguments.tiny else []), "--only", *names[i + 1 :]]
            sys.stdout.flush()
            os.execv(sys.executable, [sys.executable, __file__, *rest])
    save()
    print(f"\nWritten to {out}.")


if __name__ == "__main__":
    main()
