"""Freed large blocks serve the next allocation, unless the user chose otherwise."""

import platform
import sys

import pytest

from tests.runs import run_command

PROBE = """
import ctypes
import resource
from litgpt_moe_ext.kernels.allocator import keep_large_blocks
print(keep_large_blocks(), keep_large_blocks())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def probe(**environment):
    """Return what `keep_large_blocks` says, and the page faults of a second block of 64 MB (16384 pages)."""
    answers, faults = run_command(sys.executable, "-c", PROBE, **environment).stdout.splitlines()
    return answers, int(faults)


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")


def test_the_second_block_reuses_the_memory_of_the_first():
    answers, faults = probe()
    assert answers == "True True"
    assert faults < 1000


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_the_users_choice_stands(name):
    answers, faults = probe(**{name: "131072"})
    assert answers == "False False"
    assert faults > 10_000
