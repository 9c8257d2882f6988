"""What tests of all rooms share, in processes that run tests: one that hands them out to others needs none of it."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import parsers
from tests.runs import _whole_run, corpus_settings, finished, recipe  # noqa: F401

settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
parsers.build_once()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _matmul_precision():
    """What LitGPT's commands and our settings choose for their process is not for the tests after them."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def _compiled_code():
    """Code is compiled anew for eight models in a process, and no more: those of other tests do not count."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
