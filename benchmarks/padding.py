"""The effect of padding on the balance of experts: routed like text, as in earlier versions, or left out.

    python benchmarks/padding.py            # about 4 minutes of CPU time; the load of the machine changes no figure

A small model is trained on the functions of Python's standard library, one byte per token and one function per row, so
that about half of all tokens are padding. Over the last steps, the balance that the routers log is compared with that
of the real tokens of the same batches.
"""

import argparse
import inspect
import sys
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import litgpt_moe_ext

litgpt_moe_ext.register()

import lightning as L  # noqa: E402
from litgpt import GPT, Config  # noqa: E402
from litgpt.pretrain import initialize_weights  # noqa: E402
from litgpt.utils import chunked_cross_entropy  # noqa: E402

from litgpt_moe_ext.moe.balancing.metrics import max_violation, routers_of  # noqa: E402
from litgpt_moe_ext.tokens.padding import PADDING, PaddedRows, accept_padding  # noqa: E402

LENGTH, ROWS, EXPERTS, LAYERS = 64, 8, 8, 2
OBSERVED = 100  # steps at the end


class Observed(NamedTuple):
    """Measurements over the last steps of a run.

    Attributes:
        logged_L: MaxVio of each layer by the routers' own records, mean over steps.
        real_L: The same over real tokens only.
        idle_L: Experts of each layer with at most 1 % of the real tokens of all observed steps.
        loss: Mean training loss, in nats per real byte.
        padding: Padding as a share of all tokens.
    """

    logged_L: list[float]
    real_L: list[float]
    idle_L: list[int]
    loss: float
    padding: float


def functions() -> list[bytes]:
    """Return the source of the functions of some modules, cut at the length of a row."""
    import argparse as arguments
    import ast
    import asyncio.base_events
    import dataclasses
    import difflib
    import pathlib
    import statistics
    import tarfile
    import typing

    modules: list[ModuleType] = [
        arguments, ast, asyncio.base_events, dataclasses, difflib, inspect, pathlib, statistics, tarfile, typing,
    ]  # fmt: skip
    texts = []
    for module in modules:
        source = inspect.getsource(module)
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                text = "".join(lines[node.lineno - 1 : node.end_lineno]).strip()
                texts.append(text.encode()[: LENGTH + 1])
    return texts


def rows_of(texts: list[bytes], generator: torch.Generator) -> Tensor:
    """Return one row for each text: a random beginning of it, and padding."""
    rows = torch.full((len(texts), LENGTH + 1), PADDING)
    for row, text in zip(rows, texts, strict=True):
        length = int(torch.randint(4, len(text) + 1, (), generator=generator)) if len(text) > 4 else len(text)
        row[:length] = torch.tensor(list(text[:length]))
    return rows.as_subclass(PaddedRows)


def train(as_text: bool, steps: int, seed: int) -> Observed:
    """Train a model, with padding routed as token 0 or left out, and return what its last steps show."""
    config = Config(
        name="padding", block_size=LENGTH, vocab_size=256, padded_vocab_size=256, n_layer=LAYERS, n_embd=32, n_head=4,
        norm_class_name="RMSNorm", bias=False, parallel_residual=False, rotary_percentage=1.0, mlp_class_name="MoE",
        n_expert=EXPERTS, n_expert_per_token=2, moe_intermediate_size=32, norm_topk_prob=True,
        router_bias_update_rate=0.001,
    )  # fmt: skip
    torch.manual_seed(seed)
    fabric = L.Fabric(devices=1, accelerator="cpu")
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    generator, texts = torch.Generator().manual_seed(seed), functions()
    routers = list(routers_of(model).values())
    chosen_TK: list[Tensor] = []
    logged, real, losses, paddings = [], [], [], []
    for step in range(steps):
        if step == steps - OBSERVED:
            for router in routers:
                router.register_forward_hook(lambda _, __, routing: chosen_TK.append(routing.experts_TK))
        chosen = torch.randint(0, len(texts), (ROWS,), generator=generator).tolist()
        rows = rows_of([texts[i] for i in chosen], generator)
        inputs, targets = rows[:, :-1], rows[:, 1:].contiguous()
        loss = chunked_cross_entropy(model(inputs.clamp_min(0) if as_text else inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if chosen_TK:
            real_T = (inputs >= 0).flatten()
            records = [load_E for router in routers if (load_E := router.load_E) is not None]
            logged.append(torch.stack(records).double())
            real.append(torch.stack([x[real_T].flatten().bincount(minlength=EXPERTS) for x in chosen_TK]).double())
            losses.append(loss.item())
            paddings.append(1 - real_T.double().mean().item())
            chosen_TK.clear()
    logged_SLE, real_SLE = torch.stack(logged), torch.stack(real)
    shares_LE = real_SLE.sum(0) / real_SLE.sum(0).sum(-1, keepdim=True)
    return Observed(
        max_violation(logged_SLE).mean(0).tolist(),
        max_violation(real_SLE).mean(0).tolist(),
        (shares_LE <= 0.01).sum(-1).tolist(),
        sum(losses) / len(losses),
        sum(paddings) / len(paddings),
    )


def main() -> None:
    """Print the table of both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help=f"optimizer steps of each run, at least {OBSERVED}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way")
    arguments = parser.parse_args()
    if arguments.steps < OBSERVED:
        parser.error(f"--steps: {arguments.steps} must be at least {OBSERVED}, which are observed")
    torch.set_num_threads(1)
    accept_padding()
    print(
        f"Each figure: seeds 0 to {arguments.seeds - 1}, the mean of the last {OBSERVED} steps of {arguments.steps}.\n"
    )
    print("| padding | layer | MaxVio logged | MaxVio of real tokens | experts with at most 1 % | loss | padding |")
    print("|---|---|---|---|---|---|---|")
    runs: dict[bool, list[Observed]] = {True: [], False: []}
    for seed in range(arguments.seeds):
        for as_text in runs:
            runs[as_text].append(train(as_text, arguments.steps, seed))
            print(f"seed {seed}, {_HOW[as_text]}: {runs[as_text][-1]}", file=sys.stderr)
    for as_text, observed in runs.items():
        loss = ", ".join(f"{run.loss:.3f}" for run in observed)
        ends = [_HOW[as_text], loss, f"{sum(run.padding for run in observed) / len(observed):.0%}"]
        for layer in range(LAYERS):
            how, *rest = ends if layer == 0 else [""] * 3
            logged = ", ".join(f"{run.logged_L[layer]:.2f}" for run in observed)
            real = ", ".join(f"{run.real_L[layer]:.2f}" for run in observed)
            idle = ", ".join(str(run.idle_L[layer]) for run in observed)
            print("|", " | ".join([how, str(layer), logged, real, idle, *rest]), "|")


_HOW = {True: "routed as token 0 (before)", False: "left out"}


if __name__ == "__main__":
    main()
