"""What padding does to the balance of experts: routed as text, as it was before, and left out.

    python benchmarks/padding.py            # about six minutes beside other work

A small model is trained on the functions of Python's standard library, a byte a token and a function a row, so that
about half of all tokens are padding. At the end a held-out batch tells how the *real* tokens spread over the experts.
"""

import argparse
import inspect
import time
from types import ModuleType

import torch
from torch import Tensor

import litgpt_moe_ext

litgpt_moe_ext.register()

import lightning as L  # noqa: E402
from litgpt import GPT, Config  # noqa: E402
from litgpt.pretrain import initialize_weights  # noqa: E402
from litgpt.utils import chunked_cross_entropy  # noqa: E402

from litgpt_moe_ext.moe.metrics import max_violation, routers_of  # noqa: E402
from litgpt_moe_ext.padding import PADDING, PaddedRows, accept_padding  # noqa: E402

LENGTH, ROWS = 128, 8


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
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_source_segment(source, node)):
                texts.append(text.encode()[: LENGTH + 1])
    return texts


def rows_of(texts: list[bytes], generator: torch.Generator) -> Tensor:
    """Return one row for each text: a random beginning of it, and padding."""
    rows = torch.full((len(texts), LENGTH + 1), PADDING)
    for row, text in zip(rows, texts, strict=True):
        length = int(torch.randint(4, len(text) + 1, (), generator=generator)) if len(text) > 4 else len(text)
        row[:length] = torch.tensor(list(text[:length]))
    return rows.as_subclass(PaddedRows)


def train(as_text: bool, steps: int, seed: int) -> None:
    """Train, and print how the experts are used at the end."""
    config = Config(
        name="padding", block_size=LENGTH, vocab_size=256, padded_vocab_size=256, n_layer=3, n_embd=64, n_head=4,
        norm_class_name="RMSNorm", bias=False, parallel_residual=False, rotary_percentage=1.0, mlp_class_name="MoE",
        n_expert=8, n_expert_per_token=2, moe_intermediate_size=64, norm_topk_prob=True, router_bias_update_rate=0.001,
    )  # fmt: skip
    torch.manual_seed(seed)
    fabric = L.Fabric(devices=1, accelerator="cpu")
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    generator, texts = torch.Generator().manual_seed(seed), functions()
    loss, padding, started = torch.zeros(()), 0.0, time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(0, len(texts), (ROWS,), generator=generator).tolist()
        rows = rows_of([texts[i] for i in chosen], generator)
        inputs, targets = rows[:, :-1], rows[:, 1:].contiguous()
        padding += (inputs < 0).float().mean().item() / steps
        loss = chunked_cross_entropy(model(inputs.clamp_min(0) if as_text else inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started

    inputs = rows_of(texts[::4], generator)[:, :-1]
    real_T, loads = (inputs >= 0).flatten(), {}

    def count(name: str, experts_TK: Tensor) -> None:
        loads[name] = torch.bincount(experts_TK[real_T].flatten(), minlength=8).double()

    for name, router in routers_of(model).items():
        router.register_forward_hook(lambda _, __, routing, name=name: count(name, routing.experts_TK))
    with torch.no_grad():
        model(inputs.clamp_min(0) if as_text else inputs)
    how = "routed as token 0" if as_text else "left out"
    for layer, (name, load_E) in enumerate(loads.items()):
        record = routers_of(model)[name].load_E
        assert record is not None
        idle = int((load_E / load_E.sum() <= 0.01).sum())
        print(
            f"| {how} | {layer} | {max_violation(record):.2f} | {max_violation(load_E):.2f} | {idle} | "
            f"{1000 * seconds / steps:.1f} | {padding:.0%} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    arguments = parser.parse_args()
    accept_padding()
    print(
        "| padding | layer | MaxVio logged | MaxVio of real tokens | experts with at most 1 % | ms per step | padding |"
    )
    print("|---|---|---|---|---|---|---|")
    for as_text in (True, False):
        train(as_text, arguments.steps, arguments.seed)
