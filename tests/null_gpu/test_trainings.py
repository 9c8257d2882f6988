"""Trainings with settings that nobody has tried together, on the null GPU, with and without graphs."""

import pytest

from tests.attack.trainings_on_gpu import attack
from tests.null_gpu.trainings import TrainingsOnGpu

# On the CPU and on the GPU, and there in bfloat16.
SEEDS = (67, 43)


@pytest.mark.slow
def test_any_combination_of_training_settings(gpu, tmp_path, corpus_settings):
    with TrainingsOnGpu(gpu) as trainings:
        found = [what for seed in SEEDS for what in attack(seed, tmp_path / str(seed), corpus_settings, trainings)]
    assert found[0].startswith("on the CPU, and on the GPU, cuda_graphs: true")
    assert found[1:] == ["on the GPU with and without graphs, in bf16-mixed"]
