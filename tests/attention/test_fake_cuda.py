"""Attention on cards that are not there: no operator of a forward pass may wait for the device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Fabric
from litgpt import GPT
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda import CAPABILITIES, RECIPES, fake_cuda, forward_of_recipe
from tests.models import attention_config
from tests.subsets import soon


@pytest.fixture
def _experts_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their loop waits for the device by design; tests/moe hold the experts to the rule.
    monkeypatch.setattr("litgpt_moe_ext.moe.experts.Experts.forward", lambda self, x_TD, routing, added_TD=None: x_TD)


# Every second one soon; tests/moe runs the whole models of all recipes with experts.
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(recipe, marks=[pytest.mark.slow] * (index % 2)) for index, recipe in enumerate(RECIPES)],
    ids=lambda recipe: recipe.stem,
)
@pytest.mark.usefixtures("_experts_skipped")
def test_forward_of_a_recipe_has_no_data_dependent_operator(recipe: Path) -> None:
    with fake_cuda((9, 0)):
        logits_BTV = forward_of_recipe(recipe, layers=2)
    assert logits_BTV.device.type == "cuda"
    assert logits_BTV.shape[:2] == (1, 64)


# Cards without bfloat16, and the newest.
SOON = (CAPABILITIES[0], CAPABILITIES[-1])


@pytest.mark.parametrize("capability", soon(CAPABILITIES, SOON), ids=str)
def test_windows_documents_and_a_cache_wait_for_nothing(capability: tuple[int, int]) -> None:
    """On every card, in training and in generation, with sinks and without."""
    documents = {"attention_document_boundary": "eos", "attention_document_token_id": 3}
    settings = {"head_size": 16, "sliding_window_size": 8, "sliding_window_indices": [0, 1], **documents}
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    with fake_cuda(capability), torch.autocast("cuda", dtype):
        for sinks in (True, False):
            with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True), torch.device("cuda"):
                model = GPT(attention_config(attention_sinks=sinks, **settings))
            idx_BT = torch.zeros(2, 24, dtype=torch.long, device="cuda")
            assert model(idx_BT).shape == (2, 24, 40)
            with torch.inference_mode():
                model.set_kv_cache(2, device=torch.device("cuda"), dtype=dtype)
                position_T = torch.arange(10, device="cuda")
                assert model(idx_BT[:, :10], position_T, input_pos_maxp1=10).shape == (2, 10, 40)
                position_1 = torch.full((1,), 10, device="cuda")
                assert model(idx_BT[:, :1], position_1, input_pos_maxp1=11).shape == (2, 1, 40)


def test_a_streaming_cache_waits_for_nothing() -> None:
    """The host must be told where the text goes on."""
    yarn = {"factor": 4.0, "original_max_seq_len": 8, "beta_fast": 32.0}
    settings = {"streaming_cache_first": 2, "streaming_cache_window": 6, "rope_adjustments": yarn}
    with fake_cuda(), torch.inference_mode():
        with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True), torch.device("cuda"):
            model = GPT(attention_config(**settings))
        model.cos, model.sin = model.rope_cache(device=torch.device("cuda"))
        model.set_kv_cache(1, device=torch.device("cuda"))
        idx_BT, position_T = torch.zeros(1, 10, dtype=torch.long, device="cuda"), torch.arange(10, device="cuda")
        with pytest.raises(ValueError, match="and input_pos_maxp1 unless on a CPU"):
            model(idx_BT, position_T)
        assert model(idx_BT, position_T, input_pos_maxp1=10).shape == (1, 10, 40)


class Calls(TorchDispatchMode):
    """Records the numbers of documents and the lengths that flash attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[int, int, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._flash_attention_forward.default:
            self.sizes.add((args[3].numel() - 1, args[5], args[6]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("boundary", ["eos", "bos"])
def test_the_kernel_starts_blocks_for_the_documents_that_there_are(sinks: bool, boundary: str) -> None:
    """With the ids in host memory as many as there are, as long as they are; without them the most that may come."""
    B, T = 2, 512
    host_BT = np.zeros((B, T), dtype=np.int64)
    host_BT[0, [100, 101, 350]] = host_BT[1, 250] = 3
    settings = {"attention_document_boundary": boundary, "attention_document_token_id": 3, "head_size": 16}
    with fake_cuda((9, 0)), torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True), torch.device("cuda"):
            model = GPT(attention_config(attention_sinks=sinks, block_size=T, **settings))
        ids_BT = torch.zeros(B, T, dtype=torch.long, device="cuda")
        for copy, expected in ((None, (2 * (32 + 64), T, T)), (SimpleNamespace(numpy=lambda: host_BT), (6, 384, 384))):
            ids_BT._host_copy = copy, ids_BT._version
            with Calls() as calls:
                model(ids_BT)
            assert calls.sizes == {expected}
