"""Whole training steps: the plugin against LitGPT's `LLaMAMoE` of the same shape and a dense twin; the cost of hooks.

    python benchmarks/train_step.py                                  # everything, in less than 8 minutes on two cores
    python benchmarks/train_step.py --parts steps --recipes configs/quickstart.yaml --rounds 30
    python benchmarks/train_step.py --parts hooks

Part `steps`: LitGPT's step (forward, loss, backward, clipping, optimizer), eager and compiled. The contenders take
turns in one process on the same tokens, and ratios are medians over turns, so that other load on the machine affects
all alike. `LLaMAMoE` has LitGPT's attention and no balancing bias; the dense twin has as many active parameters in its
MLPs.

Part `hooks`: whole runs on random tokens. "hooks" is the main thread's CPU time in everything that this package adds to
LitGPT's loop (callbacks, schedule, signals, limits, all logging) as a share of the steps' CPU time, which other
programs hardly affect. The last line compares steps of `litgpt pretrain` and of `run_train.py`, in runs that take
turns.
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# As in `run_train.py`, so that threads do not hinder other programs; must come before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import yaml

import litgpt_moe_ext

litgpt_moe_ext.register()

import lightning as L  # noqa: E402
import litgpt.pretrain  # noqa: E402
from lightning.fabric.loggers import CSVLogger  # noqa: E402
from litgpt import GPT, Config  # noqa: E402
from litgpt.data import DataModule  # noqa: E402
from litgpt.pretrain import initialize_weights  # noqa: E402
from litgpt.utils import chunked_cross_entropy  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402

from litgpt_moe_ext.config.fields import added_fields  # noqa: E402
from litgpt_moe_ext.model_size import count_parameters  # noqa: E402
from litgpt_moe_ext.training.fabric import TrainingFabric  # noqa: E402
from litgpt_moe_ext.training.loop import HookedLoop  # noqa: E402
from litgpt_moe_ext.training.run import run as run_ours  # noqa: E402
from litgpt_moe_ext.training.settings import EvalArgs, Settings, TrainArgs  # noqa: E402

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Batches that two cores can process in seconds, instead of the recipes' own.
BATCHES = {"quickstart": (8, 256), "code-moe-60m": (1, 1024)}
# Settings that LitGPT's classes lack, or implement more slowly, which would be an unfair comparison.
GROUPS = ("n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "rope_adjustments")
EXPERTS = ("n_expert", "n_expert_per_token", "n_shared_expert", "moe_intermediate_size", "norm_topk_prob")


@dataclass
class Recipe:
    """The model of a recipe, and the batch size to measure it with, (B, T)."""

    path: Path
    batch: tuple[int, int] = field(init=False)
    model: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        self.model, train = content["model_config"], content["train"]
        own = (train["micro_batch_size"], train.get("max_seq_length") or self.model["block_size"])
        self.batch = BATCHES.get(self.path.stem, own)
        self.log_interval = train["log_interval"]

    def contenders(self) -> dict[str, Config]:
        """Return the configurations by name: the recipe's model, LitGPT's MoE of the same shape, the dense twin."""
        ours = Config(**self.model)
        plain = {name: value for name, value in self.model.items() if name not in (*added_fields(), *GROUPS)}
        visited = ours.n_expert_per_token + (ours.n_shared_expert or 0)
        dense = {name: value for name, value in plain.items() if name not in (*EXPERTS, "routed_scaling_factor")}
        width = visited * ours.moe_intermediate_size
        return {
            "plugin": ours,
            "LLaMAMoE": Config(**{**plain, "mlp_class_name": "LLaMAMoE"}),
            "dense twin": Config(**{**dense, "mlp_class_name": "LLaMAMLP", "intermediate_size": width}),
        }


class Trainee:
    """A model with its optimizer, one step at a time.

    Args:
        config: The model.
        compiled: Whether to compile it.
    """

    def __init__(self, config: Config, compiled: bool) -> None:
        fabric = self.fabric = L.Fabric(devices=1)
        fabric.seed_everything(0, verbose=False)
        with fabric.init_module(empty_init=True):
            model = GPT(config)
        initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
        self.model = fabric.setup(torch.compile(model) if compiled else model)
        self.optimizer = fabric.setup_optimizers(torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True))

    def step(self, batch: torch.Tensor) -> None:
        """Train on a batch of windows, (B, T + 1)."""
        loss = chunked_cross_entropy(self.model(batch[:, :-1].contiguous()), batch[:, 1:].contiguous())
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.model, self.optimizer, max_norm=1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(function: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(
    trainees: dict[str, Trainee], shape: tuple[int, int], vocabulary: int, warmup: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each step of each trainee, who take turns in changing order."""
    taken: dict[str, list[float]] = {name: [] for name in trainees}
    order = list(trainees)
    device = next(iter(trainees.values())).fabric.device
    for turn in range(warmup + rounds):
        batch = torch.randint(0, vocabulary, (shape[0], shape[1] + 1), device=device)
        order = order[1:] + order[:1]
        for name in order:
            duration = seconds(lambda name=name, batch=batch: trainees[name].step(batch))
            if turn >= warmup:
                taken[name].append(duration)
    return taken


def compare_steps(recipe: Recipe, modes: list[bool], warmup: int, rounds: int) -> None:
    """Print the table of part `steps`."""
    models = recipe.contenders()
    trainees = {
        f"{name}{', compiled' if compiled else ''}": Trainee(config, compiled)
        for compiled in modes
        for name, config in models.items()
    }
    taken = interleaved(trainees, recipe.batch, models["plugin"].padded_vocab_size, warmup, rounds)
    tokens = recipe.batch[0] * recipe.batch[1]
    print(f"\n{recipe.path.stem}, {recipe.batch[0]} x {recipe.batch[1]} tokens a step\n")
    print("| contender | parameters | active | ms a step | tok/s | speed over eager LLaMAMoE | over the dense twin |")
    print("|---|---|---|---|---|---|---|")
    for name, durations in taken.items():
        size = count_parameters(models[name.partition(",")[0]])
        median = statistics.median(durations)
        ratios = [
            f"{statistics.median(b / a for a, b in zip(durations, taken[other], strict=True)):.2f}"
            for other in ("LLaMAMoE", "dense twin")
            if other in taken
        ]
        cells = [
            f"{size.total / 1e6:.2f}M",
            f"{size.active / 1e6:.2f}M",
            f"{1e3 * median:.1f}",
            f"{tokens / median:.0f}",
        ]
        print("| " + " | ".join([name, *cells, *ratios]) + " |", flush=True)


class Clocked(IterableDataset):
    """Batches of random tokens, (B, T + 1), that record the time of every request."""

    def __init__(self, batch: tuple[int, int], vocabulary: int) -> None:
        self._batch, self._vocabulary = batch, vocabulary
        self.clock = HookClock()
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.hooks: list[float] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            self.wall.append(time.perf_counter())
            self.cpu.append(time.thread_time())
            self.hooks.append(self.clock.total)
            rows, length = self._batch
            yield torch.randint(0, self._vocabulary, (rows, length + 1), generator=generator)


class Unordered(DataLoader):
    """A loader of random tokens, with no position to resume."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class RandomTokens(DataModule):
    """A data module around `Clocked`."""

    batch: tuple[int, int]
    vocabulary: int

    def __post_init__(self) -> None:
        super().__init__()
        self.dataset = Clocked(self.batch, self.vocabulary)

    def connect(self, **_settings: Any) -> None:
        pass

    def train_dataloader(self) -> DataLoader:
        return Unordered(self.dataset, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Clocked(self.batch, self.vocabulary), batch_size=None)


class HookClock:
    """Adds up the main thread's CPU time in what this package adds to LitGPT's loop."""

    def __init__(self) -> None:
        self.total, self._depth = 0.0, 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the places through which every hook is called."""
        places = [(TrainingFabric, "call"), (TrainingFabric, "log_dict")]
        places += [(HookedLoop, name) for name in ("_between_iterations", "_learning_rate")]
        originals = [(cls, name, getattr(cls, name)) for cls, name in places]
        for cls, name, original in originals:
            setattr(cls, name, self._timed(original))
        try:
            yield
        finally:
            for cls, name, original in originals:
                setattr(cls, name, original)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            # A hook may call another; only the outer one counts.
            self._depth += 1
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.total += time.thread_time() - started

        return timed


def run(recipe: Recipe, ours: bool, steps: int, log_interval: int, warmup: int) -> tuple[list[float], float, float]:
    """Train through `run_train.py`'s or LitGPT's own entry point.

    Returns:
        Seconds of each step after the warm-up, CPU seconds of the main thread in them, and those of the hooks.
    """
    rows, length = recipe.batch
    data = RandomTokens(recipe.batch, recipe.model["padded_vocab_size"])
    train = TrainArgs(
        save_interval=None,
        log_interval=log_interval,
        global_batch_size=rows,
        micro_batch_size=rows,
        max_tokens=steps * rows * length,
        max_seq_length=length,
        max_norm=1.0,
        lr_warmup_steps=10,
        tie_embeddings=False,
    )
    never = EvalArgs(interval=10**9, max_iters=1, final_validation=False)
    config = Config(**recipe.model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        common = {"out_dir": Path(folder), "data": data, "train": train, "eval": never, "optimizer": "AdamW"}
        if ours:
            with data.dataset.clock.installed():
                once = {"devices": 1, "compile": False, "progress": False, "precision": "32-true"}
                run_ours(Settings(model_config=config, **once, **common))
        else:
            _litgpt_pretrain(config, {**common, "train": train.for_litgpt(), "eval": never.for_litgpt()})
    wall, cpu, hooks = data.dataset.wall, data.dataset.cpu, data.dataset.hooks
    times = [later - earlier for earlier, later in itertools.pairwise(wall[warmup:])]
    return times, cpu[-1] - cpu[warmup], hooks[-1] - hooks[warmup]


def _litgpt_pretrain(config: Config, arguments: dict[str, Any]) -> None:
    # As in `litgpt.pretrain.setup`, which itself would write its hyperparameters by parsing the command line again.
    fabric = L.Fabric(devices=1, loggers=[CSVLogger(arguments["out_dir"] / "logs", flush_logs_every_n_steps=1)])
    save, litgpt.pretrain.save_checkpoint = litgpt.pretrain.save_checkpoint, lambda *_args: None
    try:
        litgpt.pretrain.main(
            fabric=fabric,
            devices=1,
            seed=42,
            initial_checkpoint_dir=None,
            resume=False,
            config=config,
            tokenizer_dir=None,
            tokenizer=None,
            **arguments,
        )
    finally:
        litgpt.pretrain.save_checkpoint = save


def measure_hooks(recipe: Recipe, steps: int, pairs: int) -> None:
    """Print part `hooks`."""
    print(f"\nHooks, {recipe.path.stem}, {recipe.batch[0]} x {recipe.batch[1]} tokens a step", flush=True)
    for log_interval in dict.fromkeys((recipe.log_interval, 1)):
        times, cpu, hooks = run(recipe, True, steps, log_interval, warmup=5)
        print(f"hooks, a log line every {log_interval} steps: {100 * hooks / cpu:.2f} % of the CPU time", end="")
        print(f" ({1e3 * hooks / len(times):.2f} of {1e3 * cpu / len(times):.1f} ms a step)", flush=True)
    medians: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(pairs):
        for ours in (True, False) if pair % 2 else (False, True):
            times, _, _ = run(recipe, ours, steps, recipe.log_interval, warmup=5)
            medians[ours].append(statistics.median(times))
    ratios = [ours / plain for ours, plain in zip(medians[True], medians[False], strict=True)]
    print(f"run_train.py over litgpt pretrain, median step: {statistics.median(ratios):.3f}", end="")
    print(f" ({min(ratios):.3f} to {max(ratios):.3f} in {pairs} pairs of runs of {steps} steps)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=["steps", "hooks"], default=["steps", "hooks"])
    parser.add_argument("--recipes", nargs="+", type=Path, help="default: the quickstart and code-moe-60m")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=9, help="measured steps per contender")
    parser.add_argument("--warmup", type=int, default=3, help="steps before")
    parser.add_argument("--steps", type=int, default=30, help="steps of each run of the part hooks")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs of the part hooks")
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    arguments = parser.parse_args()
    recipes = [Recipe(path) for path in arguments.recipes or [CONFIGS / f"{name}.yaml" for name in BATCHES]]
    if dense := [str(recipe.path) for recipe in recipes if not recipe.model.get("n_expert")]:
        parser.error(f"--recipes: {', '.join(dense)} has no experts to compare with")
    torch.set_float32_matmul_precision(arguments.precision)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32 products:", end=" ")
    print(arguments.precision, flush=True)
    if "steps" in arguments.parts:
        for recipe in recipes:
            compare_steps(recipe, [mode == "compiled" for mode in arguments.modes], arguments.warmup, arguments.rounds)
            torch.compiler.reset()
    if "hooks" in arguments.parts:
        measure_hooks(recipes[0], arguments.steps, arguments.pairs)


if __name__ == "__main__":
    main()
