"""The figures of a model card against sums by hand and against training steps that are really made."""

import contextlib

import pytest
import torch
from litgpt import GPT
from litgpt.utils import chunked_cross_entropy

from litgpt_moe_ext.analysis.memory import PRECISIONS, LiveMemory, inference_memory, state_ratio, training_memory
from litgpt_moe_ext.analysis.model_card import flops, make_card
from litgpt_moe_ext.analysis.recipes import Recipe, load_recipe
from tests.models import initialized_model, moe_config

LENGTH = 32


def test_live_memory_sees_the_worst_moment():
    with LiveMemory() as memory:
        kept = torch.empty(1000, dtype=torch.uint8)
        passing = torch.empty(500, dtype=torch.uint8)
        view = kept[:10]
        assert memory.live() == 1500
        del passing
        torch.empty(200, dtype=torch.uint8)
        assert memory.live() == 1000
        assert memory.peak == 1500
        memory.reset()
        assert memory.peak == 1000
    assert len(view) == 10


def measured(config, precision: str, batch: int) -> tuple[int, int]:
    """Return bytes of the gradients, and what a micro batch adds at the peak, of a real step on the CPU."""
    dtype, autocast = PRECISIONS[precision]
    model = initialized_model(config).to(dtype)
    ids = torch.randint(0, config.vocab_size, (batch, LENGTH + 1))
    with LiveMemory() as memory:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.view(-1)  # makes it known
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        memory.reset()
        before = memory.live()
        with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            loss = chunked_cross_entropy(model(ids[:, :-1]), ids[:, 1:], chunk_size=0)
        loss.backward()
        gradients = sum(p.grad.numel() * p.grad.itemsize for p in model.parameters())
        return gradients, memory.peak - before


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_shared_expert": 1, "attention_class_name": "SinkAttention"},
        {"mlp_class_name": "NoisyTopKMoE", "mlp_activation": "relu"},
        {"mlp_class_name": "LLaMAMLP", "n_expert": 0, "n_expert_per_token": 0, "intermediate_size": 48},
    ],
    ids=["plain", "shared_sinks", "noisy_relu", "dense"],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_memory_is_that_of_a_real_step(settings, precision):
    if settings.get("mlp_class_name") == "LLaMAMLP":
        settings = {**settings, "moe_intermediate_size": None}
    config = moe_config(n_embd=64, moe_intermediate_size=48, padded_vocab_size=256, **_without(settings))
    estimate = training_memory(config, precision, 8, LENGTH, "AdamW")
    gradients, activations = measured(config, precision, 8)
    assert estimate.gradients == gradients
    assert estimate.activations == pytest.approx(activations, rel=0.05)


def _without(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "moe_intermediate_size"}


def test_weights_and_optimizer_are_exact():
    config = moe_config()
    model = GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    memory = training_memory(config, "32-true", 1, LENGTH, "AdamW")
    buffers = sum(b.numel() * b.itemsize for b in model.buffers())
    assert memory.weights == 4 * parameters + buffers
    assert (memory.gradients, memory.optimizer) == (4 * parameters, 8 * parameters)
    assert memory.total == sum(memory)
    half = training_memory(config, "bf16-true", 1, LENGTH, "AdamW")
    assert (half.gradients, half.optimizer) == (2 * parameters, 4 * parameters)


@pytest.mark.parametrize(("optimizer", "numbers"), [("AdamW", 2), ("SGD", 0), ("Adagrad", 1)])
def test_state_of_optimizers(optimizer, numbers):
    assert state_ratio(optimizer, torch.float32) == numbers


@pytest.mark.parametrize("attention", [None, "SinkAttention"])
def test_cache_is_keys_and_values(attention):
    config = moe_config(attention_class_name=attention)
    memory = inference_memory(config, torch.float32)
    # Two layers, keys and values, two groups of four elements of four bytes for each of the positions.
    assert memory.kv_cache == 2 * 2 * 2 * 4 * 4 * config.block_size


def test_flops_are_those_of_the_active_matrices():
    config = moe_config()
    D, F, E, K, T, V = 16, 12, 8, 2, LENGTH, 64
    attention = 2 * D * (16 + 2 * 8) + 2 * D * D + 4 * T * D
    layer = attention + 2 * D * E + K * 3 * 2 * D * F
    assert flops(config, T, training=False) == T * (2 * layer + 2 * D * V)
    assert flops(config, T, training=True) > 2.5 * flops(config, T, training=False)


def test_card_takes_the_settings_of_the_recipe():
    settings = {"train": {"micro_batch_size": 3, "max_seq_length": 16}, "optimizer": {"class_path": "torch.optim.SGD"}}
    card = make_card(Recipe(moe_config(), settings))
    assert (card.micro_batch_size, card.sequence_length, card.optimizer) == (3, 16, "SGD")
    assert card.parameters_active < card.parameters_total
    assert card.training["32-true"]["optimizer"] == 0
    assert card.checkpoint_training["32-true"] == card.checkpoint_weights["float32"]
    assert make_card(Recipe(moe_config(), settings), micro_batch_size=1).micro_batch_size == 1


def test_llama_moe_can_be_carded():
    card = make_card(Recipe(moe_config(mlp_class_name="LLaMAMoE")), micro_batch_size=1)
    ours = make_card(Recipe(moe_config()), micro_batch_size=1)
    assert card.parameters_total == ours.parameters_total
    assert card.flops_per_token_forward == ours.flops_per_token_forward


def test_wrong_recipes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(FileNotFoundError, match=r"no model_config\.yaml"):
        load_recipe(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {}")
    with pytest.raises(ValueError, match="neither model_config nor model_name"):
        load_recipe(recipe)
    recipe.write_text("model_config: {n_expert: 3, mlp_class_name: SharedExpertMoE, n_expert_per_token: 9}")
    with pytest.raises(ValueError, match="n_expert_per_token: 9"):
        load_recipe(recipe)
    recipe.write_text("- a list")
    with pytest.raises(ValueError, match="list instead of settings"):
        load_recipe(recipe)
