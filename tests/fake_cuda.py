"""CUDA cards that are not there: models on fake `cuda` tensors, which have shapes and types but no values.

An operator whose result depends on values raises `DataDependentOutputException` here; on a real card the host would
wait for the device. Only forward passes work: autograd's engine asks the driver for a context.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Fabric
from litgpt import GPT, Config
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
# Cards by compute capability: T4, A100, RTX 3060, RTX 4090, H100, B200, RTX 5090.
CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}


@contextlib.contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeTensorMode]:
    """Make tensors fake in this scope, and torch believe in one card of this compute capability."""
    # In this order: torch puts a guard in place of the driver as long as it knows that there is none.
    with FakeTensorMode() as mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        # Of a card that it believes in, torch 2.10 makes a real tensor, for backward passes, and its optimizers ask.
        patch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        properties = SimpleNamespace(name="faked", multi_processor_count=100)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: capability >= (8, 0))
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        patch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        patch.setattr(torch.backends.cudnn, "version", lambda: 92000)
        yield mode


def forward_of_recipe(recipe: Path, layers: int | None = None) -> Tensor:
    """Run the whole model of a recipe forward in the recipe's own precision, inside `fake_cuda`.

    The model trains: its dropout, balancing and auxiliary losses are on.

    Args:
        recipe: Its layers are all alike.
        layers: At most so many of them; None for all.

    Returns:
        Logits, (1, 64, vocabulary), fake.
    """
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    precision = settings.get("precision") or "bf16-mixed"  # what null means on a card that has bfloat16
    kind, _, mode = precision.partition("-")
    changed = settings["model_config"]
    if layers is not None:
        changed = {**changed, "n_layer": min(layers, changed["n_layer"])}
    # Weights stay as they come, as filling them would need the card.
    with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True), torch.device("cuda"):
        model = GPT(Config(**changed))
        idx_BT = torch.zeros(1, 64, dtype=torch.long)
    if mode == "true":
        model.to(DTYPES[kind])
    with torch.autocast("cuda", DTYPES[kind], enabled=mode == "mixed"):
        return model(idx_BT)
