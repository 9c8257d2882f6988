"""Does the context grow? Loss by position beyond the trained length, with and without YaRN, with and without sinks.

    python benchmarks/context_extension.py --out context_extension    # about ten minutes on two cores

Small byte-level models are trained on the source of Python's standard library in windows of 128 bytes, with and without
learnable sinks. Each is then read at 512 bytes with its rotary tables replaced:

- `none`: as trained, positions simply go on;
- `linear`: positions divided by 4;
- `inverted`: YaRN as LitGPT 0.5.13 computes it, which slows the fast frequencies and leaves the slow ones alone;
- `YaRN`: YaRN as `litgpt_moe_ext.attention.rope` computes it,

once without further training and once after a few steps at 512 bytes. Printed is the mean loss in nats per byte by
position, over windows that no model was trained on; a plot of the same goes to `OUT.png`, the numbers to `OUT.json`.
"""

import argparse
import json
import math
import multiprocessing
import platform
import random
import statistics
import subprocess
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import litgpt_moe_ext

litgpt_moe_ext.register()

import litgpt.model  # noqa: E402
from litgpt import GPT, Config  # noqa: E402

from litgpt_moe_ext.attention.rope import build_rope_cache  # noqa: E402

TRAINED, EXTENDED = 128, 512
FACTOR = EXTENDED / TRAINED
YARN = {"factor": FACTOR, "original_max_seq_len": TRAINED, "beta_fast": 32, "beta_slow": 1}
RULES: dict[str, dict[str, Any] | None] = {"none": None, "linear": {"factor": FACTOR}, "inverted": YARN, "YaRN": YARN}
BUCKETS = [(0, 64), (64, 128), (128, 192), (192, 256), (256, 384), (384, 512)]
BATCH_TOKENS = 4096
LEARNING_RATE = 3e-3


def read_corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes to train on, and windows of `EXTENDED + 1` bytes from other files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    random.Random(0).shuffle(files)
    texts = [path.read_bytes() for path in files]
    held_out, rest = texts[: len(texts) // 20], texts[len(texts) // 20 :]
    windows = [
        text[begin : begin + EXTENDED + 1]
        for text in held_out
        for begin in range(0, len(text) - EXTENDED, EXTENDED + 1)
    ]
    random.Random(0).shuffle(windows)
    return _bytes(b"\n".join(rest)), torch.stack([_bytes(window) for window in windows[:64]])


def _bytes(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def make_model(has_sinks: bool, seed: int) -> GPT:
    """Build and initialise a model of 0.4 million parameters."""
    torch.manual_seed(seed)
    model = GPT(
        Config(
            n_layer=3, n_embd=96, n_head=4, n_query_groups=4, intermediate_size=256, block_size=EXTENDED,
            padded_vocab_size=256, rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", attention_class_name="SinkAttention",
            attention_sinks=has_sinks,
        )
    )  # fmt: skip
    model.apply(model._init_weights)
    return model


def set_rule(model: GPT, rule: str) -> None:
    """Replace the rotary tables of a model."""
    if rule == "inverted":
        config = model.config
        # The attention factor is YaRN's, so that the ramp is the only difference.
        cos, sin = litgpt.model.build_rope_cache(
            EXTENDED, config.rope_n_elem, base=config.rope_base, extra_config={**YARN, "mscale": 1.0}
        )
        factor = 0.1 * math.log(FACTOR) + 1.0
        norm = (cos[0, 0].item() ** 2 + sin[0, 0].item() ** 2) ** 0.5
        model.cos, model.sin = cos / norm * factor, sin / norm * factor
        return
    config = Config(**{**vars_of(model.config), "rope_adjustments": RULES[rule]})
    model.cos, model.sin = build_rope_cache(config, EXTENDED)


def vars_of(config: Config) -> dict[str, Any]:
    """Return what `Config` needs to build the same configuration again."""
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def train(model: GPT, corpus: torch.Tensor, length: int, steps: int, seed: int, learning_rate: float) -> None:
    """Train a model in place on random windows of `length` bytes, with a linear warm-up and a cosine to a tenth."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    offsets = torch.arange(length + 1)
    for step in range(steps):
        progress = step / steps
        rate = min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        begins = torch.randint(corpus.numel() - length, (BATCH_TOKENS // length, 1), generator=generator)
        window = corpus[begins + offsets]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def losses_by_position(model: GPT, windows: torch.Tensor) -> list[float]:
    """Return the mean loss at each of the `EXTENDED` positions, nats per byte."""
    total = torch.zeros(EXTENDED)
    for batch in windows.split(16):
        logits = model(batch[:, :-1])
        total += F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").sum(0)
    return (total / len(windows)).tolist()


def study(has_sinks: bool, seed: int, steps: int, tuning_steps: int) -> dict[str, list[float]]:
    """Train one model and read it under every rule. Returns losses by position, by name of the reading."""
    torch.set_num_threads(1)
    corpus, windows = read_corpus()
    model = make_model(has_sinks, seed)
    train(model, corpus, TRAINED, steps, seed, LEARNING_RATE)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    readings = {}
    for rule in RULES:
        set_rule(model, rule)
        readings[rule] = losses_by_position(model, windows)
    for rule in RULES:
        model.load_state_dict(trained)
        set_rule(model, rule)
        train(model, corpus, EXTENDED, tuning_steps, seed + 1, LEARNING_RATE / 4)
        readings[f"{rule}, tuned"] = losses_by_position(model, windows)
    return readings


def mean_over(losses: list[float], bucket: tuple[int, int]) -> float:
    """Return the mean loss of a range of positions."""
    return statistics.fmean(losses[slice(*bucket)])


def print_table(results: dict[tuple[bool, int], dict[str, list[float]]], seeds: int) -> None:
    """Print the means over the seeds as a Markdown table."""
    print("| sinks | reading | " + " | ".join(f"{a}-{b}" for a, b in BUCKETS) + " |")
    print("| --- | --- " + "| --- " * len(BUCKETS) + "|")
    for has_sinks in (False, True):
        for reading in results[has_sinks, 0]:
            cells = [
                statistics.fmean(mean_over(results[has_sinks, seed][reading], bucket) for seed in range(seeds))
                for bucket in BUCKETS
            ]
            print(f"| {'on' if has_sinks else 'off'} | {reading} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    print("\nEffect of sinks, loss with minus loss without, by seed (negative: sinks help):")
    for reading, bucket in product(("none", "YaRN", "YaRN, tuned"), ((0, TRAINED), (TRAINED, EXTENDED))):
        differences = [
            mean_over(results[True, seed][reading], bucket) - mean_over(results[False, seed][reading], bucket)
            for seed in range(seeds)
        ]
        print(f"- {reading}, positions {bucket[0]}-{bucket[1]}: " + ", ".join(f"{x:+.4f}" for x in differences))


def plot(results: dict[tuple[bool, int], dict[str, list[float]]], seeds: int, path: Path) -> None:
    """Draw the loss by position, smoothed over 16 positions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    colors = {"none": "tab:gray", "linear": "tab:orange", "inverted": "tab:red", "YaRN": "tab:blue"}
    for axis, suffix in zip(axes, ("", ", tuned"), strict=True):
        for rule, has_sinks in product(RULES, (False, True)):
            mean = torch.tensor([results[has_sinks, seed][rule + suffix] for seed in range(seeds)]).mean(0)
            smooth = mean.view(-1, 16).mean(1)
            label = f"{rule}{', sinks' if has_sinks else ''}"
            style = "--" if has_sinks else "-"
            axis.plot(torch.arange(8, EXTENDED, 16), smooth, style, color=colors[rule], label=label)
        axis.axvline(TRAINED, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("position (trained to the dotted line)")
        axis.set_title("tables replaced only" if not suffix else "after a few steps at 512 bytes")
    axes[0].set_ylabel("loss, nats per byte")
    axes[1].legend(fontsize=8, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=350, help="steps of 4096 bytes at 128 bytes")
    parser.add_argument("--tuning-steps", type=int, default=20, help="steps of 4096 bytes at 512 bytes")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="models trained at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("context_extension"))
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f"--out: {args.out.parent} must be a folder")

    begin = time.perf_counter()
    cases = list(product((False, True), range(args.seeds)))
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(study, sinks, seed, args.steps, args.tuning_steps) for sinks, seed in cases]
        results = dict(zip(cases, (future.result() for future in futures), strict=True))

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, commit {commit or 'unknown'}; {args.steps} "
        f"steps at {TRAINED}, {args.tuning_steps} at {EXTENDED}, {args.seeds} seeds, "
        f"{time.perf_counter() - begin:.0f} s. Loss in nats per byte by position.\n"
    )
    print_table(results, args.seeds)
    named = {f"sinks={sinks} seed={seed}": readings for (sinks, seed), readings in results.items()}
    args.out.with_name(args.out.name + ".json").write_text(json.dumps(named))
    plot(results, args.seeds, args.out.with_name(args.out.name + ".png"))


if __name__ == "__main__":
    main()
