"""Trainings with any combination of settings, each in several ways that must come to the same.

`python -m tests.attack.trainings --count 100` tries more of them than a test may, and prints what came of them.
"""

import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.attack.by_seed import try_seeds
from tests.attack.training_runs import Refused, Runs, check_close, check_same, checkpoint_of
from tests.attack.training_settings import OF_MICRO_BATCHES, RANDOM, random_sections
from tests.runs import corpus_in, recipe_writer

RECOMPUTED = ("full", "selective")
STRATEGIES = ("ddp", "fsdp", "fsdp2", "fsdp_shard_grad_op")
_COMPILED = 0.05
"""How many trainings are compiled as well, which takes half a minute."""


def random_runs(chance: random.Random, folder: Path, corpus: dict[str, Any]) -> Runs:
    """Return runs of a recipe with random settings.

    Args:
        chance: What chooses.
        folder: For the runs; must not be there.
        corpus: Settings of the corpus, as `corpus_in` returns them.
    """
    folder.mkdir()
    model = yaml.safe_load(recipe_writer(folder, corpus)().read_text())["model_config"]
    sections = random_sections(chance, model)
    return Runs(folder, recipe_writer(folder, corpus | sections.pop("data", {})), sections)


def attack(seed: int, folder: Path, corpus: dict[str, Any]) -> Iterator[str]:
    """Train in every way that random settings allow, and yield these ways.

    Args:
        seed: Of the settings.
        folder: For the runs; must not be there.
        corpus: Settings of the corpus, as `corpus_in` returns them.
    """
    chance = random.Random(seed)
    runs = random_runs(chance, folder, corpus)
    settings = str(runs.sections)
    try:
        whole = runs.train("whole")
    except Refused as refused:
        yield f"refused: {str(refused).partition(':')[0]}"
        return
    go_on = ("--resume", checkpoint_of(whole))
    check_same(runs.train("resumed", *go_on), whole)
    yield "resumed"
    mode = chance.choice(RECOMPUTED)
    odd = check_close(runs.train("recomputed", "--activation_checkpointing", mode), whole)
    yield f"recomputed: {mode}{odd}"
    if any(word in settings for word in (*RANDOM, "bf16")):
        return
    if chance.random() < _COMPILED:
        yield f"compiled{check_close(runs.train('compiled', '--compile', 'true'), whole)}"
    if any(word in settings for word in OF_MICRO_BATCHES):
        return
    rows, micro_batch = (runs.sections["train"][f"{name}_batch_size"] for name in ("global", "micro"))
    cut = chance.choice([n for n in range(1, rows + 1) if rows % n == 0 and n != micro_batch])
    yield f"other micro-batches{check_close(runs.train('cut', micro_batch=cut), whole, validation=False)}"
    strategy, mode = chance.choice(STRATEGIES), chance.choice(("none", *RECOMPUTED))
    if strategy != "ddp" and "fused_cross_entropy" in settings:
        return  # which is refused
    how = {"ranks": 2, "micro_batch": chance.choice([n for n in (1, 2, 3) if rows % (2 * n) == 0])}
    shared = runs.train("shared", *go_on, "--activation_checkpointing", mode, strategy=strategy, **how)
    yield f"two processes go on: {strategy}{check_close(shared, whole, validation=False)}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        try_seeds(__doc__, 50, partial(attack, corpus=corpus_in(Path(folder))))
