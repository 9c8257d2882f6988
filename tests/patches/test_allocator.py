"""Freed large blocks serve the next allocation, unless the user chose otherwise."""

import os
import platform
import subprocess
import sys

import pytest

PROBE = """
import resource
import torch
from litgpt_moe_ext.patches.allocator import keep_large_blocks
print(keep_large_blocks(), keep_large_blocks())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 * 2**20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def probe(**environment):
    """Return what `keep_large_blocks` says, and the page faults of a second 64 MB tensor (16384 pages)."""
    result = subprocess.run(
        [sys.executable, "-c", PROBE], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    answers, faults = result.stdout.splitlines()
    return answers, int(faults)


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")


def test_the_second_tensor_reuses_the_memory_of_the_first():
    answers, faults = probe()
    assert answers == "True True"
    assert faults < 1000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_the_users_choice_stands(name):
    answers, faults = probe(**{name: "131072"})
    assert answers == "False False"
    assert faults > 10_000
