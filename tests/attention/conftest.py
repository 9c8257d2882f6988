"""What all attention tests need."""

from collections.abc import Callable

import pytest
import torch
from litgpt import Config

import litgpt_moe_ext
from tests.models import attention_config


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    litgpt_moe_ext.register()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_config(_registered: None) -> Callable[..., Config]:
    """Build a two-layer configuration with grouped queries that names `SinkAttention`; keywords override."""
    return attention_config
