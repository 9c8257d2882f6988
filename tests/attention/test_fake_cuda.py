"""Attention on cards that are not there: no operator of a forward pass may wait for the device."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Fabric
from litgpt import GPT, Config

from tests.fake_cuda import CAPABILITIES, RECIPES, fake_cuda, forward_of_recipe


@pytest.fixture
def _experts_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their loop waits for the device by design; tests/moe hold the experts to the rule.
    monkeypatch.setattr("litgpt_moe_ext.moe.experts.Experts.forward", lambda self, x_TD, routing: x_TD)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
@pytest.mark.usefixtures("_experts_skipped")
def test_forward_of_a_recipe_has_no_data_dependent_operator(recipe: Path) -> None:
    with fake_cuda((9, 0)):
        logits_BTV = forward_of_recipe(recipe)
    assert logits_BTV.device.type == "cuda"
    assert logits_BTV.shape[:2] == (1, 64)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_windows_documents_and_a_cache_wait_for_nothing(
    make_config: Callable[..., Config], capability: tuple[int, int]
) -> None:
    """On every card, in training and in generation, with sinks and without."""
    documents = {"attention_document_boundary": "eos", "attention_document_token_id": 3}
    settings = {"head_size": 16, "sliding_window_size": 8, "sliding_window_indices": [0, 1], **documents}
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    with fake_cuda(capability), torch.autocast("cuda", dtype):
        for sinks in (True, False):
            with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True), torch.device("cuda"):
                model = GPT(make_config(attention_sinks=sinks, **settings))
            idx_BT = torch.zeros(2, 24, dtype=torch.long, device="cuda")
            assert model(idx_BT).shape == (2, 24, 40)
            with torch.inference_mode():
                model.set_kv_cache(2, device=torch.device("cuda"), dtype=dtype)
                position_T = torch.arange(10, device="cuda")
                assert model(idx_BT[:, :10], position_T, input_pos_maxp1=10).shape == (2, 10, 40)
                position_1 = torch.full((1,), 10, device="cuda")
                assert model(idx_BT[:, :1], position_1, input_pos_maxp1=11).shape == (2, 1, 40)
