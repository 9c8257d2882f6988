"""Trainings with any combination of settings, each in several ways that must come to the same.

`python -m tests.attack.trainings --count 100` tries more of them than a test may, and prints what came of them.
"""

import contextlib
import copy
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt import GPT, Config

from tests.attack.by_seed import try_seeds
from tests.runs import corpus_in, logged, recipe_writer, weights_of
from tests.training.processes import train_in_ranks

STEPS, BATCH, LENGTH = 6, 4, 32
MODEL: tuple[dict[str, Any], ...] = (
    *({"mlp_activation": name} for name in ("clamped_swiglu", "geglu", "gelu", "relu2")),
    *({"router_type": name, "norm_topk_prob": None, "router_bias_update_rate": None} for name in ("hash", "uniform")),
    {"router_type": "noisy_topk", "norm_topk_prob": None, "router_bias_update_rate": None},
    *({"router_score_function": "softmax", "norm_topk_prob": value} for value in (True, False)),
    *({"n_expert": n, "n_expert_per_token": k} for n, k in ((2, 1), (4, 4), (16, 3))),
    {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1},
    *({"n_layer": n} for n in (1, 3)),
    {"first_k_dense_replace": 1, "intermediate_size": 40},
    {"decoder_sparse_step": 2, "intermediate_size": 40},
    {"n_shared_expert": None},
    {"shared_expert_gate": True},
    {"router_bias": True},
    {"expert_gate_on_input": True},
    {"router_z_loss_coef": 0.01},
    {"router_sequence_balancing_loss_coef": 0.1},
    {"router_orthogonality_loss_coef": 0.1},
    {"router_load_balancing_loss_coef": 0.1},
    {"router_load_balancing_loss_coef": 0.1, "router_load_balancing_loss_scope": "global_batch"},
    {"expert_dropout": 0.1},
    {"residual_dropout": 0.1},
    {"attention_sinks": [True, False]},
    {"attention_document_boundary": "eos", "attention_document_token_id": 0},
    *({"sliding_window_size": size, "sliding_window_indices": [1, 0]} for size in (1, 9)),
    {"rope_adjustments": {"factor": 4.0, "original_max_seq_len": 16, "beta_fast": 32, "beta_slow": 1}},
    {"position_embedding": "learned", "rotary_percentage": 0.0},
    {"norm_qk": True, "norm_qk_type": "olmo2"},
    {"norm_class_name": "LayerNorm", "bias": True},
)
TRAINING: tuple[dict[str, Any], ...] = (
    {"train": {"tie_embeddings": True}},
    {"fused_cross_entropy": True},
    {"ema": {"decay": 0.9}},
    *({"data": {"packing": name}} for name in ("pad", "best_fit")),
    {"precision": "bf16-mixed"},
)
RECOMPUTED = ("full", "selective")
STRATEGIES = ("ddp", "fsdp", "fsdp2", "fsdp_shard_grad_op")
RANDOM = ("noisy_topk", "uniform", "dropout")
"""What draws random numbers, which come to other tokens where the batch is cut in another way."""
OF_MICRO_BATCHES = ("router_load_balancing_loss_coef",)
"""Losses of a micro-batch, which are others in other ones; that over the global batch knows only earlier ones."""


def random_sections(chance: random.Random, model: dict[str, Any]) -> dict[str, Any]:
    """Return sections of a recipe, the model changed in up to four ways that go together, the training in two.

    Args:
        chance: What chooses.
        model: The model to change.
    """
    changes: dict[str, Any] = {}
    for change in chance.sample(MODEL, chance.randint(0, 4)):
        changed = {**changes, **change}
        with contextlib.suppress(ValueError):  # of ours or of LitGPT's
            GPT(Config(**{k: v for k, v in copy.deepcopy({**model, **changed}).items() if v is not None}))
            changes = changed
    sections: dict[str, Any] = {"model_config": changes}
    for change in chance.sample(TRAINING, chance.randint(0, 2)):
        sections |= copy.deepcopy(change)
    return sections


@dataclass(frozen=True)
class Runs:
    """Runs of one recipe.

    Attributes:
        folder: Where they are.
        write: Writes the recipe with changed sections.
        sections: What the attack changes.
    """

    folder: Path
    write: Callable[..., Path]
    sections: dict[str, Any]

    def train(self, name: str, *flags: str | Path, ranks: int = 1, micro_batch: int = 2, **changes: Any) -> Path:
        """Train, and return the directory of the run.

        Args:
            name: Of the directory.
            *flags: The rest of the command line.
            ranks: Number of processes.
            micro_batch: Rows that go through the model at once.
            **changes: More sections.
        """
        sizes = {"global_batch_size": BATCH, "micro_batch_size": micro_batch, "max_tokens": STEPS * BATCH * LENGTH}
        sections = copy.deepcopy(self.sections)
        sections["train"] = {**sections.get("train", {}), **sizes, "save_interval": STEPS // 2, "min_lr": 0.01}
        # A step of Adam is as long for a tiny gradient as for a large one: rounding would become a difference.
        sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.3, "momentum": 0.9}}
        out_dir = self.folder / name
        file = self.write(name, out_dir=str(out_dir), optimizer=sgd, **sections, **changes)
        train_in_ranks(ranks, "--config", file, *flags, OMP_NUM_THREADS="1")
        return out_dir


def attack(seed: int, folder: Path, corpus: dict[str, Any]) -> Iterator[str]:
    """Train in every way that random settings allow, and yield these ways.

    Args:
        seed: Of the settings.
        folder: For the runs; must not be there.
        corpus: Settings of the corpus, as `corpus_in` returns them.
    """
    folder.mkdir()
    chance, plain = random.Random(seed), recipe_writer(folder, corpus)()
    sections = random_sections(chance, yaml.safe_load(plain.read_text())["model_config"])
    settings = str(sections)
    runs = Runs(folder, recipe_writer(folder, corpus | sections.pop("data", {})), sections)
    whole = runs.train("whole")
    half = whole / f"step-{STEPS // 2:08}"
    check_same(runs.train("resumed", "--resume", half), whole)
    yield "resumed"
    mode = chance.choice(RECOMPUTED)
    check_close(runs.train("recomputed", "--activation_checkpointing", mode), whole)
    yield f"recomputed: {mode}"
    if any(word in settings for word in (*RANDOM, *OF_MICRO_BATCHES, "bf16")):
        return
    check_close(runs.train("cut", micro_batch=chance.choice([1, 4])), whole)
    yield "other micro-batches"
    strategy, mode = chance.choice(STRATEGIES), chance.choice(("none", *RECOMPUTED))
    if strategy != "ddp" and "fused_cross_entropy" in settings:
        return  # which is refused
    start = ("--initial_checkpoint_dir", half)
    shared = runs.train("shared", *start, "--activation_checkpointing", mode, ranks=2, micro_batch=1, strategy=strategy)
    check_close(shared, runs.train("alone", *start))
    yield f"two processes: {strategy}"


def check_same(ours: Path, theirs: Path) -> None:
    """Check that two runs have the same weights, bit for bit."""
    first, second = weights_of(ours / "final"), weights_of(theirs / "final")
    assert first.keys() == second.keys()
    different = [name for name, weight in first.items() if not torch.equal(weight, second[name])]
    assert not different, f"{ours.name} has other {', '.join(different)}"


def check_close(ours: Path, theirs: Path) -> None:
    """Check that two runs are the same in every step, but for rounding."""
    for column in ("loss", "grad_norm", "max_vio"):
        first, second = ({k: float(v) for k, v in logged(run, column).items()} for run in (ours, theirs))
        assert first.keys() == second.keys()
        for step, value in first.items():
            difference = abs(value - second[step]) / max(1.0, abs(second[step]))
            assert difference <= 1e-3, f"{ours.name}: {column} of step {step} is {value}, not {second[step]}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        try_seeds(__doc__, 50, partial(attack, corpus=corpus_in(Path(folder))))
