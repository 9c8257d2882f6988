"""The figures of a model card against sums by hand and against training steps that are really made."""

import contextlib
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litgpt import GPT
from litgpt.utils import chunked_cross_entropy

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.cost import layers
from litgpt_moe_ext.inspect.cost.memory import (
    PRECISIONS,
    Step,
    TrainingMemory,
    inference_memory,
    training_memory,
)
from litgpt_moe_ext.inspect.cost.model_card import make_card
from litgpt_moe_ext.inspect.cost.optimizer_state import measure_state_ratio, state_ratio
from litgpt_moe_ext.inspect.cost.sharding import STRATEGIES, BlockSizes, block_sizes, process_memory
from litgpt_moe_ext.inspect.doctor.room import disk
from litgpt_moe_ext.inspect.recipes import load_recipe
from litgpt_moe_ext.loss.cross_entropy import mean_cross_entropy
from litgpt_moe_ext.meta.models import meta_model
from litgpt_moe_ext.model_size import count_flops
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from litgpt_moe_ext.training.callbacks.fused_loss import FusedLoss
from litgpt_moe_ext.training.optim.muon import MuonAdamW
from litgpt_moe_ext.training.optim.parameter_groups import group_parameters
from litgpt_moe_ext.training.settings import ParameterGroupArgs
from tests.inspect.live_memory import LiveMemory
from tests.models import HAS_FUSED_LOSS, initialized_model, moe_config, needs_fused_loss
from tests.settings import recipe_with
from tests.subsets import soon

LENGTH = 32
RECIPE = {
    "block_size": LENGTH, "n_layer": 2, "n_embd": 16, "n_head": 4, "vocab_size": 64, "padded_vocab_size": 64,
    "n_expert": 8, "n_expert_per_token": 2, "moe_intermediate_size": 12, "bias": False, "parallel_residual": False,
}  # fmt: skip
DOCUMENTS = {
    "attention_class_name": "SinkAttention", "attention_document_boundary": "eos", "attention_document_token_id": 64,
}  # fmt: skip
NO_SAVERS = {"activation_checkpointing": "none", "fused_cross_entropy": False}
MUON = f"{MuonAdamW.__module__}.MuonAdamW"


def test_live_memory_sees_the_worst_moment():
    with LiveMemory() as memory:
        kept = torch.empty(1000, dtype=torch.uint8)
        passing = torch.empty(500, dtype=torch.uint8)
        view = kept[:10]
        assert memory.live == 1500
        del passing
        torch.empty(200, dtype=torch.uint8)
        assert memory.live == 1000
        assert memory.peak == 1500
        memory.reset()
        assert memory.peak == 1000
    assert len(view) == 10


def save_memory(model, cross_entropy, activation_checkpointing, fused_cross_entropy):
    """Do to a model what training does to it, and return its loss function."""
    if activation_checkpointing != "none":
        ActivationCheckpointing(activation_checkpointing).on_before_setup(model)
    if not fused_cross_entropy:
        return cross_entropy
    fused = FusedLoss()
    fused.on_before_setup(model)
    return fused.wrap(cross_entropy)


LITGPTS = partial(chunked_cross_entropy, chunk_size=0)


def measured(config, precision: str, batch: int, cross_entropy=LITGPTS, **savers) -> tuple[int, int]:
    """Return bytes of the gradients, and what a micro batch adds at the peak, of a real step on the CPU."""
    dtype, autocast = PRECISIONS[precision]
    model = initialized_model(config).to(dtype)
    cross_entropy = save_memory(model, cross_entropy, **{**NO_SAVERS, **savers})
    ids = torch.randint(0, config.vocab_size, (batch, LENGTH + 1))
    with LiveMemory() as memory:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.view(-1)  # makes it known
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        memory.reset()
        before = memory.live
        with contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
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
        {**DOCUMENTS, "attention_document_restart_positions": True},
    ],
    ids=["plain", "shared_sinks", "noisy_relu", "dense", "documents"],
)
@pytest.mark.parametrize("precision", soon(["32-true", "bf16-mixed"], ["bf16-mixed"]))
def test_training_memory_is_that_of_a_real_step(settings, precision):
    config = moe_config(n_embd=64, moe_intermediate_size=48, padded_vocab_size=256, **settings)
    estimate = training_memory(layers.shorten(config), Step(precision, 8, LENGTH))
    gradients, activations = measured(config, precision, 8)
    assert estimate.gradients == gradients
    assert estimate.activations == pytest.approx(activations, rel=0.05)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_memory_with_the_loss_of_gpus(monkeypatch, precision):
    """Which keeps the logits as the head wrote them, and puts their gradient in their place."""
    kernels = pytest.importorskip("litgpt_moe_ext.loss.cross_entropy_kernels")
    monkeypatch.setattr(kernels, "launch", lambda *_: None)
    config = moe_config(n_embd=64, moe_intermediate_size=48, padded_vocab_size=4096)

    def loss(logits, targets):
        return mean_cross_entropy(logits.flatten(0, 1), targets.flatten())

    estimate = training_memory(layers.shorten(config), Step(precision, 8, LENGTH, kernel_loss=True)).activations
    assert estimate == pytest.approx(measured(config, precision, 8, loss)[1], rel=0.05)
    assert estimate < 0.7 * training_memory(layers.shorten(config), Step(precision, 8, LENGTH)).activations


@pytest.mark.parametrize("mode", soon(["none", "selective", "full"], ["selective", "full"]))
@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_fused_loss)])
def test_memory_savers_save_what_they_save_in_a_real_step(mode, fused):
    config = moe_config(
        n_layer=4, n_embd=64, moe_intermediate_size=48, padded_vocab_size=1024, attention_class_name="SinkAttention"
    )
    savers = {"activation_checkpointing": mode, "fused_cross_entropy": fused}
    estimate = training_memory(layers.shorten(config), Step("32-true", 8, LENGTH, **savers)).activations
    assert estimate == pytest.approx(measured(config, "32-true", 8, **savers)[1], rel=0.06)
    if mode != "none" or fused:
        assert estimate < 0.9 * training_memory(layers.shorten(config), Step("32-true", 8, LENGTH)).activations


DEEP = {
    "sinks": {"n_layer": 4, "attention_class_name": "SinkAttention"},
    "lead": {"n_layer": 6, "first_k_dense_replace": 2, "intermediate_size": 24},
    "turns": {"n_layer": 8, "decoder_sparse_step": 2, "intermediate_size": 24},
    "windows": {"n_layer": 8, "sliding_window_size": 8, "sliding_window_indices": [1, 0] * 4},
    "noisy": {"n_layer": 4, "mlp_class_name": "NoisyTopKMoE", "mlp_activation": "relu", "router_z_loss_coef": 0.1},
    "llama_moe": {"n_layer": 4, "mlp_class_name": "LLaMAMoE"},
}


@pytest.fixture
def whole(monkeypatch):
    """Return a function that calls another one on whole models instead of short ones."""

    def call(measure, n_layer: int):
        with monkeypatch.context() as patch:
            patch.setattr(layers, "PERIODS", n_layer)
            return measure()

    return call


def costs(config, steps: list[Step]) -> list:
    """Return everything that is measured on a short model."""
    short = layers.shorten(config)
    length = steps[0].sequence_length
    return [
        *(training_memory(short, step) for step in steps),
        inference_memory(short, torch.float32),
        short.extrapolate(partial(count_flops, length=length, training=True)),
    ]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["in turns", "all"])
@pytest.mark.parametrize("name", soon(DEEP, ("lead", "turns", "windows")))
def test_a_short_model_tells_what_the_whole_one_takes(name, every, whole):
    """To the byte, in every part of a step. Models take turns with the steps."""
    config = moe_config(padded_vocab_size=512, **DEEP[name])
    steps = [
        Step("bf16-mixed", 2, LENGTH, activation_checkpointing="full"),
        Step("bf16-mixed", 2, LENGTH, activation_checkpointing="selective", fused_cross_entropy=HAS_FUSED_LOSS),
        Step("32-true", 2, LENGTH),
    ][list(DEEP).index(name) % every :: every]
    assert layers.shorten(config).left_out
    assert costs(config, steps) == whole(lambda: costs(config, steps), config.n_layer)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_short_recipes_tell_what_the_whole_ones_take(path, whole):
    recipe = load_recipe(path)
    steps = [recipe.step("bf16-mixed")]
    assert costs(recipe.config, steps) == whole(lambda: costs(recipe.config, steps), recipe.config.n_layer)


@pytest.mark.slow
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {
            "n_layer": st.integers(3, 6),
            "padded_vocab_size": st.sampled_from([64, 512]),
            "norm_class_name": st.sampled_from(["RMSNorm", "LayerNorm"]),
            "attention_class_name": st.sampled_from([None, "SinkAttention"]),
            "norm_qk": st.booleans(),
            "first_k_dense_replace": st.integers(0, 2),
            "decoder_sparse_step": st.integers(1, 2),
            "intermediate_size": st.just(24),
            "n_shared_expert": st.integers(0, 2),
        }
    ),
    st.builds(
        partial(Step, micro_batch_size=2, sequence_length=LENGTH),
        precision=st.sampled_from([name for name in PRECISIONS if name != "16-mixed"]),
        activation_checkpointing=st.sampled_from(["none", "full", "selective"]),
        fused_cross_entropy=st.sampled_from(sorted({False, HAS_FUSED_LOSS})),
        tie_embeddings=st.booleans(),
    ),
)
def test_short_models_of_any_configuration_tell_what_the_whole_ones_take(whole, changes, step):
    config = moe_config(**changes)
    assert costs(config, [step]) == whole(lambda: costs(config, [step]), config.n_layer)


def test_models_without_a_pattern_are_measured_whole():
    config = moe_config(n_layer=5, first_k_dense_replace=3, intermediate_size=24)
    assert layers.shorten(config).config.n_layer == 5
    assert layers.shorten(moe_config(n_layer=2)).left_out == 0


def test_processes_share():
    memory = TrainingMemory(weights=1000, gradients=1000, optimizer=2000, activations=500)
    of = partial(process_memory, memory, BlockSizes(100, 300))
    assert of("fsdp", 1, 1) == (1000, 1000, 2000, 0, 500, 0)
    assert of("auto", 4, 1) == of("ddp", 4, 1) == (1000, 1000, 2000, 1000, 500, 0)
    # Everything outside the blocks, two blocks, and the largest gradient that is whole.
    assert of("fsdp", 4, 1) == of("fsdp2", 4, 1) == (250, 250, 500, 300 + 200 + 300, 500, 0)
    assert of("fsdp_shard_grad_op", 4, 1) == (250, 250, 500, 1000 + 300, 500, 0)
    # Within a node, or among all.
    assert of("fsdp", 4, 2)[:3] == (250, 250, 500)
    assert of("fsdp2", 4, 2)[:3] == (125, 125, 250)
    # ZeRO: of 1000 + 2000 bytes of float32 weights and optimizer, then of the gradients, then of the weights as well.
    assert of("deepspeed_stage_1", 4, 1) == (1000, 1000, 750, 1000, 500, 0)
    assert of("deepspeed_stage_2", 4, 1) == (1000, 250, 750, 1000, 500, 0)
    assert of("deepspeed_stage_3", 2, 2) == (250, 250, 750, 300 + 200 + 300, 500, 0)
    assert of("deepspeed_stage_2", 1, 1, cpu_offload=True).host == 3000
    # Of parameters in 16 bits, too, and without a moving average, which counts with the weights.
    averaged = memory._replace(weights=3000)
    assert process_memory(averaged, BlockSizes(100, 300, itemsize=2), "deepspeed_stage_2", 4, 1).optimizer == 1500
    offloaded = of("fsdp2", 4, 1, cpu_offload=True)
    assert offloaded.host == 1000
    assert offloaded.total == of("fsdp2", 4, 1).total
    with pytest.raises(ValueError, match="strategy: 'zero9' is unknown; choose from auto, ddp, fsdp"):
        of("zero9", 4, 1)


def test_blocks_and_the_rest_are_all_parameters():
    config = moe_config(n_layer=3, first_k_dense_replace=1, intermediate_size=24)
    model = GPT(config)
    block, outside, _ = block_sizes(layers.shorten(config), 4)
    assert block == 4 * sum(p.numel() for p in model.transformer.h[1].parameters())
    assert outside == 4 * (2 * 64 * 16 + 16)  # two tables and a norm


def test_weights_and_optimizer_are_exact():
    config = moe_config()
    model = GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    memory = training_memory(layers.shorten(config), Step("32-true", 1, LENGTH))
    buffers = sum(b.numel() * b.itemsize for b in model.buffers())
    assert memory.weights == 4 * parameters + buffers
    assert (memory.gradients, memory.optimizer) == (4 * parameters, 8 * parameters)
    assert memory.total == sum(memory)
    half = training_memory(layers.shorten(config), Step("bf16-true", 1, LENGTH))
    assert (half.gradients, half.optimizer) == (2 * parameters, 4 * parameters)


@pytest.mark.parametrize("changes", [{}, {"n_layer": 6, "n_shared_expert": 1, "mlp_class_name": "SharedExpertMoE"}])
@pytest.mark.parametrize("tied", [False, True])
def test_muon_remembers_one_number_for_those_of_matrices(changes, tied):
    config = moe_config(**{"n_layer": 2, **changes})
    model = initialized_model(config)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    optimizer = MuonAdamW(group_parameters(model, ParameterGroupArgs(), split_matrices=True))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # AdamW counts its steps as well.
    held = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    expected = sum(value.numel() * value.itemsize for value in held)
    step = Step("32-true", 1, LENGTH, MUON, "selective", tie_embeddings=tied)
    assert training_memory(layers.shorten(config), step).optimizer == expected


@pytest.mark.slow
def test_a_checkpoint_of_muon_takes_less_room():
    config = moe_config(n_embd=1024, moe_intermediate_size=2048)
    numbers = {name: parameter.numel() for name, parameter in meta_model(config).named_parameters()}
    matrices = sum(numbers[name] for name in numbers if re.search(r"attn\.(qkv|proj)\.|experts", name))
    total = sum(numbers.values())
    assert 0.9 * total < matrices < total
    for optimizer, remembered in ((MUON, 2 * total - matrices), ("AdamW", 2 * total)):
        taken = 4 * (total + remembered) / 2**30
        recipe = recipe_with(config, {"optimizer": {"class_path": optimizer}, "precision": "32-true"})
        assert disk(recipe).text.startswith(f"a training checkpoint takes about {taken:.2f} GiB")
        assert make_card(recipe).checkpoint_training["32-true"] == pytest.approx(4 * (total + remembered), rel=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_adafactor_remembers_rows_and_columns(tied):
    config = moe_config(n_layer=1)
    model = GPT(config)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    optimizer = torch.optim.Adafactor(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    step = Step("32-true", 1, LENGTH, "Adafactor", tie_embeddings=tied)
    assert training_memory(layers.shorten(config), step).optimizer == sum(value.nbytes for value in held)


@pytest.mark.parametrize(("optimizer", "numbers"), [("AdamW", 2), ("Adam", 2), ("SGD", 0), ("Adagrad", 1)])
def test_state_of_optimizers(optimizer, numbers):
    assert state_ratio(optimizer, torch.float32) == measure_state_ratio(optimizer, torch.float32) == numbers


def test_what_is_no_optimizer_is_refused():
    for optimizer in ("Nothing", "no.such.Thing", {"init_args": {}}, {"class_path": "AdamW", "init_args": [1]}):
        with pytest.raises(SettingsError, match="^optimizer: .* must be"):
            state_ratio(optimizer, torch.float32)


class Broken(torch.optim.SGD):
    """An optimizer whose library lacks something here."""

    def step(self, closure=None):
        raise RuntimeError("no driver")


def test_optimizers_are_written_as_a_run_takes_them():
    with_momentum = {"class_path": "SGD", "init_args": {"momentum": 0.9}}
    assert state_ratio(with_momentum, torch.float32) == 1
    assert state_ratio({"class_path": "RMSprop", "init_args": None}, torch.float32) == 1
    broken = f"{__name__}.Broken"
    with pytest.raises(SettingsError, match=f"^optimizer: '{broken}' cannot make a step: no driver"):
        state_ratio(broken, torch.float32)


def test_amsgrad_remembers_more():
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"amsgrad": True}}
    assert state_ratio(optimizer, torch.float32) == 3
    # Its step reads a number, which the tensors without values of the model have not.
    short = layers.shorten(moe_config(n_layer=1))
    usual = training_memory(short, Step("32-true", 1, LENGTH)).optimizer
    assert 2 * training_memory(short, Step("32-true", 1, LENGTH, optimizer)).optimizer == 3 * usual


def memory_of_a_prompt(config):
    """Return the bytes that cache and activations of a real prompt take at the worst moment."""
    model, ids = initialized_model(config).eval(), torch.randint(64, (1, 512))
    with LiveMemory() as memory, torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.view(-1)  # makes it known
        before = memory.live
        model.set_kv_cache(1, dtype=torch.float32)
        model(ids, torch.arange(512), input_pos_maxp1=512)
        return memory.peak - before


@pytest.mark.parametrize(
    "settings", [{}, {"attention_class_name": "SinkAttention"}, DOCUMENTS], ids=["plain", "sinks", "documents"]
)
def test_inference_memory_is_that_of_a_real_prompt(settings):
    # Long enough for LitGPT's mask to matter.
    dense = {"mlp_class_name": "LLaMAMLP", "n_expert": 0, "n_expert_per_token": 0, "intermediate_size": 48}
    config = moe_config(n_layer=6, block_size=512, padded_vocab_size=128, **dense, **settings)
    estimate = inference_memory(layers.shorten(config), torch.float32)
    # Keys and values, two groups of four elements of four bytes for each of the positions.
    assert estimate.kv_cache == 6 * 2 * 2 * 4 * 4 * 512
    assert estimate.kv_cache + estimate.activations == pytest.approx(memory_of_a_prompt(config), rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"expert_gate_on_input": True}, {"mlp_activation": "relu"}], ids=str)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_inference_memory_of_experts(on_gpu, changes):
    """Those of a CPU are computed one after the other, those of a GPU together, by torch's grouped products at most."""
    # All of them for each token, so that all have equally many; wide enough for the peak to be theirs.
    config = moe_config(
        attention_class_name="SinkAttention", block_size=512, n_expert=4, n_expert_per_token=4,
        moe_intermediate_size=64, expert_backend="grouped_mm" if on_gpu else None, **changes,
    )  # fmt: skip
    estimate = inference_memory(layers.shorten(config), torch.float32, on_gpu)
    assert estimate.kv_cache + estimate.activations == pytest.approx(memory_of_a_prompt(config), rel=0.02)


def test_a_forced_kernel_need_not_work_here():
    """As that of a GPU in a recipe that is described on a laptop, or by the doctor beside the GPU."""
    step = Step("bf16-mixed", 2, LENGTH)
    chosen, forced, written_out = (
        layers.shorten(moe_config(attention_class_name="SinkAttention", attention_backend=backend))
        for backend in (None, "cudnn", "eager")
    )
    assert training_memory(forced, step) == training_memory(chosen, step)
    assert training_memory(written_out, step).activations > training_memory(chosen, step).activations
    assert inference_memory(forced, torch.bfloat16, on_gpu=True) == inference_memory(
        chosen, torch.bfloat16, on_gpu=True
    )


def test_flops_are_those_of_the_active_matrices():
    config = moe_config()
    D, F, E, K, T, V = 16, 12, 8, 2, LENGTH, 64
    attention = 2 * D * (16 + 2 * 8) + 2 * D * D + 4 * T * D
    layer = attention + 2 * D * E + K * 3 * 2 * D * F
    assert count_flops(config, T, training=False) == T * (2 * layer + 2 * D * V)
    assert count_flops(config, T, training=True) > 2.5 * count_flops(config, T, training=False)


def test_card_takes_the_settings_of_the_recipe():
    settings = {"train": {"micro_batch_size": 3, "max_seq_length": 16}, "optimizer": {"class_path": "torch.optim.SGD"}}
    config = moe_config(block_size=32, vocab_size=60, padded_vocab_size=64)
    card = make_card(recipe_with(config, settings))
    assert (card.micro_batch_size, card.sequence_length, card.optimizer) == (3, 16, "SGD")
    assert card.parameters_embedding == 64 * config.n_embd
    assert card.kv_cache_per_token["float32"] * 32 == card.inference["float32"]["GPU"]["kv_cache"]
    assert card.flops_per_token_forward == count_flops(config, 16, training=False) / 16
    assert card.flops_per_token_training == count_flops(config, 16, training=True) / 16
    assert card.parameters_active < card.parameters_total
    assert card.processes == {}
    assert card.training["32-true"]["optimizer"] == 0
    assert card.checkpoint_training["32-true"] == card.checkpoint_weights["float32"]
    assert make_card(recipe_with(moe_config(), settings), micro_batch_size=1).micro_batch_size == 1
    settings["train"]["max_seq_length"] = 33
    with pytest.raises(SettingsError, match="^train.max_seq_length: 33 must be from 1 to the model's block_size: 32"):
        make_card(recipe_with(config, settings))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_moving_average_takes_room(tied):
    """Once in memory and once in a checkpoint, in float32; a table with two names has two averages."""
    train = {"tie_embeddings": tied, "max_seq_length": 8}
    config = moe_config(n_layer=4)
    numbers = sum(tensor.numel() for tensor in GPT(config).state_dict().values() if tensor.is_floating_point())
    cards = [make_card(recipe_with(config, {"train": train, "ema": {"decay": decay}}), 1) for decay in (None, 0.0)]
    for figures in ("training", "checkpoint_training"):
        without, there = (getattr(card, figures)["bf16-true"] for card in cards)
        grown = there - without if figures != "training" else there["total"] - without["total"]
        assert grown == 4 * numbers


def test_tied_tables_count_once():
    tied, untied = (make_card(recipe_with(moe_config(), {"train": {"tie_embeddings": tie}})) for tie in (True, False))
    table = 64 * 16
    assert untied.parameters_total - tied.parameters_total == table
    for part, copies in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert untied.training["32-true"][part] - tied.training["32-true"][part] == 4 * copies * table
    with_optimizer = untied.checkpoint_weights["float32"] + untied.training["32-true"]["optimizer"]
    assert untied.checkpoint_training["32-true"] == with_optimizer
    assert untied.checkpoint_weights["float32"] - tied.checkpoint_weights["float32"] == 4 * table


@needs_fused_loss
def test_card_knows_savers_and_strategies(tmp_path, capsys):
    settings = {
        "model_config": {**RECIPE, "mlp_class_name": "SharedExpertMoE"},
        "activation_checkpointing": "full",
        "fused_cross_entropy": True,
        "precision": "bf16-true",
        "devices": 4,
        "num_nodes": 2,
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    card = make_card(load_recipe(recipe))
    assert set(card.activations) == {
        "none", "selective", "full", "none + fused", "selective + fused", "full + fused"
    }  # fmt: skip
    assert card.training["bf16-true"]["activations"] == card.activations["full + fused"] < card.activations["none"]
    assert set(card.processes) == set(STRATEGIES)
    assert card.processes["fsdp2"]["weights"] == -(-card.training["bf16-true"]["weights"] // 8)
    assert main(["model-card", str(recipe)]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "activation checkpointing full, fused cross-entropy" in page
    assert "Each of 4 processes on each of 2 nodes, bf16-true" in page
    assert main(["model-card", str(recipe), "--devices=0"]) == 2
    assert "devices: 0 must be an integer of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("installed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_card_says_whose_loss_it_counts_with(tmp_path, monkeypatch, capsys, installed):
    monkeypatch.setattr("litgpt_moe_ext.inspect.cost.model_card.triton_installed", lambda: installed)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model_config": {**RECIPE, "mlp_class_name": "SharedExpertMoE"}}))
    assert main(["model-card", str(recipe)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Training is that of a GPU with Triton" if installed else "Training has LitGPT's loss")
    card, step = make_card(load_recipe(recipe)), Step("32-true", 4, LENGTH, kernel_loss=installed)
    assert (
        card.training["32-true"]["activations"]
        == training_memory(layers.shorten(load_recipe(recipe).config), step).activations
    )


@pytest.mark.slow
def test_llama_moe_can_be_carded():
    card = make_card(recipe_with(moe_config(mlp_class_name="LLaMAMoE")), micro_batch_size=1)
    ours = make_card(recipe_with(moe_config()), micro_batch_size=1)
    assert card.parameters_total == ours.parameters_total
    assert card.flops_per_token_forward == ours.flops_per_token_forward


def test_wrong_recipes_are_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    with pytest.raises(SettingsError, match=r"recipe.yaml' cannot be read \(No such file"):
        load_recipe(recipe)
    with pytest.raises(SettingsError, match=r"must have a model_config\.yaml"):
        load_recipe(tmp_path)
    for text, message in (
        ("train: {}", "model_config: null must be a model"),
        (
            "model_config: {n_expert: 3, mlp_class_name: NoisyTopKMoE, n_expert_per_token: 9}",
            "n_expert_per_token: 9",
        ),
        ("model_config: {n_head: 0}", "n_head: 0 must be an integer of at least 1"),
        ("model_config: {norm_class_name: BatchNorm}", "norm_class_name: 'BatchNorm' must be one of RMSNorm or"),
        ("model_config: {name: 7}", "name: 7 must be text"),
        ("model_config: [1]", "model_config: .1. must be keys and values"),
        ("- a list", "holds no settings; it must consist of"),
        ("train:\n  a: [\n", "line 3 is not YAML: expected .*; indent with spaces, close brackets, and put text in"),
        ("train:\n\ta: 1\n", "line 2 is not YAML: found character .* cannot start any token; indent with spaces"),
        ("model_config: {n_layer: 1}\nmodel_config: {n_layer: 2}", "line 2 repeats model_config"),
    ):
        recipe.write_text(text)
        with pytest.raises(SettingsError, match=message):
            load_recipe(recipe)
    recipe.write_text("model_config: {norm_eps: 1e-6}")
    assert load_recipe(recipe).config.norm_eps == 1e-6, "a number, as for training"
    for text, message in (
        ("n_head: 0", "n_head: 0 must be an integer of at least 1"),
        ("norm_class_name: 7", "norm_class_name: 7 must be one of RMSNorm or LayerNorm"),
        ("name: 7", "name: 7 must be text"),
        ("final_logit_softcapping: 1e4", "final_logit_softcapping: '1e4' must be a number"),  # as LitGPT reads it
        ("norm_eps: 2024-02-30", "model_config.yaml cannot be read"),
    ):
        (tmp_path / "model_config.yaml").write_text(text)
        with pytest.raises(SettingsError, match=message):
            load_recipe(tmp_path)
