"""Attention on cards that are not there: no operator of a forward pass may wait for the device."""

from pathlib import Path

import pytest

from tests.fake_cuda import RECIPES, fake_cuda, forward_of_recipe


@pytest.fixture
def _experts_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their loop waits for the device by design; tests/moe hold the experts to the rule.
    monkeypatch.setattr("litgpt_moe_ext.moe.experts.Experts.forward", lambda self, x_Td, routing: x_Td)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
@pytest.mark.usefixtures("_experts_skipped")
def test_forward_of_a_recipe_has_no_data_dependent_operator(recipe: Path) -> None:
    with fake_cuda((9, 0)):
        logits_BTV = forward_of_recipe(recipe)
    assert logits_BTV.device.type == "cuda"
    assert logits_BTV.shape[:2] == (1, 64)
