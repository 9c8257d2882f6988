"""Several null GPUs and the NCCL between them: right numbers, and an error for what would hang on a card."""

import sys

import pytest

from tests import null_gpu
from tests.null_gpu.ranks import outputs
from tests.runs import run_command

pytestmark = pytest.mark.slow


def test_every_operation(gpu):
    """Every type and reduction, of more than a chunk."""
    assert [output.splitlines()[-1] for output in outputs(gpu, 2, "-m", "tests.null_gpu.exchange")] == ["done"] * 2


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("count", "rank 0 calls ncclAllReduce of 3 float32 (sum, root or peer 0), rank 1 ncclAllReduce of 4 float32"),
        ("type", "rank 0 calls ncclAllReduce of 3 float16 (sum, root or peer 0), rank 1 ncclAllReduce of 3 bfloat16"),
        ("operation", "rank 0 calls ncclBroadcast of 3 float32 (sum, root or peer 0), rank 1 ncclAllReduce"),
        ("device", "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 0"),
        ("death", "rank 0 waits in ncclAllReduce for rank 1 (process"),
        ("graph", "operation not supported"),
    ],
)
def test_what_would_hang(gpu, mistake, message):
    """Or be refused, or give other numbers on every rank."""
    first, _ = outputs(gpu, 2, "-m", "tests.null_gpu.exchange", mistake)
    assert message in first
    assert "refused: " in first.splitlines()[-1]


def test_devices(gpu):
    """Each has its memory, its streams and its random numbers; what is of one is refused on the other."""
    environment = null_gpu.environment(gpu, 90, mib=64, devices=2)
    ended = run_command(sys.executable, "-m", "tests.null_gpu.devices", **environment)
    assert ended.stdout.splitlines()[-1] == "done"
