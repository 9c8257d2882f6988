"""The null GPU, compiled once for the tests that want one."""

import pytest

from tests import null_gpu


@pytest.fixture(scope="session")
def gpu(tmp_path_factory):
    """The library that is one."""
    # It needs a compiler and CUDA's headers, which a machine with PyTorch need not have.
    if (lack := null_gpu.missing()) is not None:
        pytest.skip(lack)
    return null_gpu.build(tmp_path_factory.mktemp("null_gpu"))
