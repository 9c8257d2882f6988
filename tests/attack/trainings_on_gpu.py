"""Trainings with any combination of settings, on the null GPU: with and without CUDA graphs, and on the CPU.

`python -m tests.attack.trainings_on_gpu --count 20` tries more of them than a test may, and prints what came of them.
"""

import random
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests import null_gpu
from tests.attack.by_seed import try_seeds
from tests.attack.training_runs import Refused, Runs, check_close, check_same, checkpoint_of
from tests.attack.training_settings import RANDOM
from tests.attack.trainings import RECOMPUTED, random_runs
from tests.null_gpu.trainings import TrainingsOnGpu
from tests.runs import corpus_in

# What the CPU does in another way: its random numbers are others, 16 bits round elsewhere, and so does Muon on GPUs.
_OTHER_ON_CPUS = (*RANDOM, "bf16", "Muon")
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
_ON_BOTH = 0.7
"""How many of the trainings that a CPU computes alike are held against it."""


def attack(seed: int, folder: Path, corpus: dict[str, Any], gpu: TrainingsOnGpu) -> Iterator[str]:
    """Train on the CPU, go on from its first checkpoint on the GPU, and yield what came to the same.

    Args:
        seed: Of the settings.
        folder: For the runs; must not be there.
        corpus: Settings of the corpus, as `corpus_in` returns them.
        gpu: Trains.
    """
    chance = random.Random(seed)
    runs = random_runs(chance, folder, corpus)
    try:
        whole = runs.train("whole")
    except Refused as refused:
        yield f"refused: {str(refused).partition(':')[0]}"
        return
    begin = checkpoint_of(whole)
    # A graph cannot draw the same random numbers again.
    modes = ("none",) if any(word in str(runs.sections) for word in RANDOM) else ("none", "none", *RECOMPUTED)
    mode = ("--activation_checkpointing", chance.choice(modes))
    if not any(word in str(runs.sections) for word in _OTHER_ON_CPUS) and chance.random() < _ON_BOTH:
        graphs = chance.choice(("true", "auto", "false"))
        ours = _train(gpu, runs, graphs, *mode, "--resume", begin, "--precision", "32-true")
        yield f"on the CPU, and on the GPU, cuda_graphs: {graphs}{check_close(ours, whole)}"
        return
    rows, micro_batch = (runs.sections["train"][f"{name}_batch_size"] for name in ("global", "micro"))
    # With graphs a sum of micro-batches is rounded once where it is kept in 16 bits, else twice.
    precision = chance.choice(_PRECISIONS if rows == micro_batch else _PRECISIONS[:-1])
    how = (*mode, "--initial_checkpoint_dir", begin, "--precision", precision, "--train.max_steps", "5")
    check_same(_train(gpu, runs, "true", *how), _train(gpu, runs, "false", *how))
    yield f"on the GPU with and without graphs, in {precision}"


def _train(gpu: TrainingsOnGpu, runs: Runs, graphs: str, *flags: str | Path) -> Path:
    name = f"graphs-{graphs}"
    said = gpu.train(runs.folder / f"{name}.txt", "--config", runs.recipe(name), "--cuda_graphs", graphs, *flags)
    assert ("CUDA graphs: on" in said) == (graphs != "false"), said
    return runs.folder / name


if __name__ == "__main__":
    if (lack := null_gpu.missing()) is not None:
        raise SystemExit(f"There is no null GPU: {lack}.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TrainingsOnGpu(null_gpu.build(folder)) as gpu:
            try_seeds(__doc__, 20, partial(attack, corpus=corpus_in(folder), gpu=gpu))
