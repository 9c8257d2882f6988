"""Whole training steps: the plugin against LitGPT's `LLaMAMoE` of the same shape and against a dense twin.

    python benchmarks/train_step.py                 # the quickstart, eager, a few minutes on two cores
    python benchmarks/train_step.py --compile       # with torch.compile as well
    python benchmarks/train_step.py --config configs/OTHER.yaml

A step is LitGPT's: forward, loss, backward, clipping, optimizer. The contenders take turns in one process on the same
tokens, and ratios are medians over turns, so that what else the machine does weighs on all alike. `LLaMAMoE` has no
bias that balances its experts and LitGPT's attention; the dense twin has as many active parameters in its MLPs.

The second table is the cost of the hooks: the same steps with what `run_train.py` does around each of them (schedule,
gradient guard, gradient norm, telemetry, signals), as a share of a step without.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

import litgpt_moe_ext

litgpt_moe_ext.register()

from litgpt import GPT, Config  # noqa: E402
from litgpt.pretrain import initialize_weights  # noqa: E402
from litgpt.utils import chunked_cross_entropy  # noqa: E402

from litgpt_moe_ext.model_size import count_parameters  # noqa: E402
from litgpt_moe_ext.training.anomalies import GradientGuard  # noqa: E402
from litgpt_moe_ext.training.arguments import AnomalyArgs, ParameterGroupArgs, ScheduleArgs  # noqa: E402
from litgpt_moe_ext.training.control import StepLimits, StopRequests  # noqa: E402
from litgpt_moe_ext.training.fabric import GradientNorm, TrainingFabric  # noqa: E402
from litgpt_moe_ext.training.optimization import Optimization  # noqa: E402
from litgpt_moe_ext.training.telemetry import Telemetry  # noqa: E402

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
ROUTER_FIELDS = ("router_score_function", "router_bias_update_rate", "attention_class_name", "attention_sinks")


def configs(settings: dict[str, Any]) -> dict[str, Config]:
    """Return the contenders by name: the recipe's model, LitGPT's MoE of the same shape, the dense twin."""
    ours = Config(**settings)
    plain = {name: value for name, value in settings.items() if name not in ROUTER_FIELDS}
    visited = ours.n_expert_per_token + (ours.n_shared_expert or 0)
    experts = ("n_expert", "n_expert_per_token", "n_shared_expert", "moe_intermediate_size", "norm_topk_prob")
    dense = {name: value for name, value in plain.items() if name not in experts}
    return {
        "plugin": ours,
        "LLaMAMoE": Config(**{**plain, "mlp_class_name": "LLaMAMoE"}),
        "dense twin": Config(
            **{**dense, "mlp_class_name": "LLaMAMLP", "intermediate_size": visited * ours.moe_intermediate_size}
        ),
    }


class Trainee:
    """A model with its optimizer, one step at a time.

    Args:
        config: The model.
        compiled: Whether to compile it.
        hooks: Whether to do what `run_train.py` does around a step.
        folder: Where a gradient guard may write.
    """

    def __init__(self, config: Config, compiled: bool, hooks: bool, folder: Path) -> None:
        callbacks: list[Any] = []
        self.hooks = hooks
        fabric = self.fabric = TrainingFabric(
            show=lambda _message: None, accelerator="auto", devices=1, callbacks=callbacks
        )
        if hooks:
            for callback in (
                GradientNorm(),
                Telemetry(fabric.device),
                GradientGuard(AnomalyArgs(spike_factor=10.0), folder, 0, print),
            ):
                fabric.add_callback(callback)
        self.optimization = Optimization(ScheduleArgs(), ParameterGroupArgs(), scaled=False)
        fabric.add_callback(self.optimization)
        fabric.seed_everything(0, verbose=False)
        with fabric.init_module(empty_init=True):
            model = GPT(config)
        initialize_weights(fabric, model, n_layer=config.n_layer, n_embd=config.n_embd)
        self.model = fabric.setup(torch.compile(model) if compiled else model)
        made = self.optimization.make_optimizer({"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}, None)
        self.optimizer = fabric.setup_optimizers(made)
        self.stop_requests, self.limits = StopRequests(print), StepLimits(10**9, None)
        self.state = {"train_dataloader": [], "step_count": 0, "iter_num": 0}

    def step(self, batch: torch.Tensor) -> None:
        """Train on a batch of windows, (B, T + 1)."""
        fabric, state = self.fabric, self.state
        if self.hooks:
            self.stop_requests.agreed(fabric)
            self.limits.reached(state["step_count"], fabric)
            fabric.call("on_step_begin", state=state)
            fabric.call("on_batch", batch=batch, waited=0.0)
            rate = self.optimization.learning_rate(state["step_count"], 1e-3, 1e-4, 100, 10_000)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        loss = chunked_cross_entropy(self.model(batch[:, :-1].contiguous()), batch[:, 1:].contiguous())
        fabric.backward(loss)
        if self.hooks:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=1.0)
        else:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        state["step_count"] += 1


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
    for turn in range(warmup + rounds):
        device = next(iter(trainees.values())).fabric.device
        batch = torch.randint(0, vocabulary, (shape[0], shape[1] + 1), device=device)
        order = order[1:] + order[:1]
        for name in order:
            duration = seconds(lambda name=name, batch=batch: trainees[name].step(batch))
            if turn >= warmup:
                taken[name].append(duration)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="recipe to take the model and the batch from")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps per contender")
    parser.add_argument("--warmup", type=int, default=5, help="steps before")
    parser.add_argument("--micro-batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision(arguments.precision)
    recipe = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    settings, train = recipe["model_config"], recipe["train"]
    length = train.get("max_seq_length") or settings["block_size"]
    shape = (arguments.micro_batch_size or train["micro_batch_size"], length)
    models = configs(settings)
    folder = Path(tempfile.mkdtemp())
    measure = (shape, settings["padded_vocab_size"], arguments.warmup, arguments.rounds)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, float32 products:", end=" ")
    print(f"{arguments.precision}; {arguments.config.stem}, {shape[0]} x {shape[1]} tokens a step")
    modes = (False, True) if arguments.compile else (False,)
    trainees = {
        f"{name}{', compiled' if compiled else ''}": Trainee(config, compiled, False, folder)
        for compiled in modes
        for name, config in models.items()
    }
    taken = interleaved(trainees, *measure)
    print("\n| contender | parameters | active | ms a step | tok/s | time over the plugin's |")
    print("|---|---|---|---|---|---|")
    for name, durations in taken.items():
        size = count_parameters(models[name.partition(",")[0]])
        ratio = statistics.median(a / b for a, b in zip(durations, taken["plugin"], strict=True))
        median = statistics.median(durations)
        cells = [f"{size.total / 1e6:.2f}M", f"{size.active / 1e6:.2f}M", f"{1e3 * median:.1f}"]
        print("| " + " | ".join([name, *cells, f"{shape[0] * shape[1] / median:.0f}", f"{ratio:.2f}"]) + " |")

    hooked = {name: Trainee(models["plugin"], False, name == "with hooks", folder) for name in ("plain", "with hooks")}
    taken = interleaved(hooked, *measure)
    ratio = statistics.median(a / b for a, b in zip(taken["with hooks"], taken["plain"], strict=True))
    print(f"\nCost of the hooks around a step: {100 * (ratio - 1):+.1f} % (median of {arguments.rounds} pairs)")


if __name__ == "__main__":
    main()
