"""`litgpt-moe model-card`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt_moe_ext.field_types import PositiveInt
from litgpt_moe_ext.wording import abbreviated, counted

if TYPE_CHECKING:
    from litgpt_moe_ext.inspect.cost.model_card import ModelCard as Card


# By whether training has the kernel.
_LOSSES = {
    True: "Training is that of a GPU with Triton, whose loss makes no copy of the logits; without it LitGPT's does.",
    False: "Training has LitGPT's loss, which copies the logits; that of a GPU with Triton does not.",
}


@dataclass(frozen=True)
class ModelCard:
    """Print parameters, FLOPs per token and memory of a model, from its recipe, before anything is trained.

    Attributes:
        model: A recipe (YAML file) or a checkpoint directory.
        micro_batch_size: Sequences per forward pass in training. Default: as in the recipe.
        devices: Processes on each node, for the memory of one of them by strategy. Default: as in the recipe.
        num_nodes: Number of nodes. Default: as in the recipe.
        json: File to write the figures to, in bytes.
    """

    model: Path
    micro_batch_size: PositiveInt | None = None
    devices: PositiveInt | None = None
    num_nodes: PositiveInt | None = None
    json: Path | None = None

    def run(self) -> None:
        """Print the card."""
        from litgpt_moe_ext.cli.output import write_json
        from litgpt_moe_ext.inspect.cost.model_card import make_card
        from litgpt_moe_ext.inspect.recipes import load_recipe

        card = make_card(load_recipe(self.model), self.micro_batch_size, self.devices, self.num_nodes)
        _print_size(card)
        _print_training(card)
        if card.processes:
            _print_processes(card)
        _print_activations(card)
        _print_inference(card)
        print("Tensors only: the runtime itself, libraries' workspaces and the allocator's reserve come on top.")
        print(_LOSSES[card.kernel_loss])
        if self.json is not None:
            write_json(self.json, card.to_dict())


def _print_size(card: "Card") -> None:
    use = "is the output head as well" if card.tie_embeddings else "is only looked up"
    share = card.parameters_active / card.parameters_total
    caches = ", ".join(f"{_size(size)} in {name}" for name, size in card.kv_cache_per_token.items())
    print(card.name)
    print(
        f"  parameters: {card.parameters_total:,} in total, {card.parameters_active:,} active per token "
        f"({share:.1%}; {card.parameters_embedding:,} are the token embedding, which {use})"
    )
    print(
        f"  FLOPs per token, in sequences of {card.sequence_length}: {_flops(card.flops_per_token_forward)} forward, "
        f"{_flops(card.flops_per_token_training)} in training (attention to all positions counted, as in mfu)"
    )
    print(f"  key/value cache per token: {caches}")


def _print_training(card: "Card") -> None:
    mode = card.activation_checkpointing
    savers = "" if mode == "none" else f", activation checkpointing {mode}"
    savers += ", fused cross-entropy" if card.fused_cross_entropy else ""
    tokens = f"{card.micro_batch_size} x {card.sequence_length} tokens per micro-batch"
    columns = ("precision", "weights", "grads", "optimizer", "activations", "total", "checkpoint")
    rows = {name: {**memory, "checkpoint": card.checkpoint_training[name]} for name, memory in card.training.items()}
    _print_memory(f"\nTraining, {tokens}, {card.optimizer}{savers}", columns, rows)


def _print_processes(card: "Card") -> None:
    nodes = f" on each of {card.num_nodes} nodes" if card.num_nodes > 1 else ""
    columns = ("strategy", "weights", "grads", "optim.", "comm.", "activations", "total")
    keys = ("weights", "gradients", "optimizer", "communication", "activations", "total")
    rows = {name: {key: memory[key] for key in keys} for name, memory in card.processes.items()}
    _print_memory(f"Each of {counted(card.devices, 'process')}{nodes}, {card.precision}", columns, rows)
    print(
        "Strategies that shard weights make all of them first: deepspeed_stage_3 on the GPU, the others there or, "
        "where it lacks room, in the memory of the CPU."
    )


def _print_activations(card: "Card") -> None:
    title = "Activations by activation_checkpointing and fused_cross_entropy"
    _print_memory(title, ("precision", *card.activations), {card.precision: card.activations})


def _print_inference(card: "Card") -> None:
    columns = ("dtype", "weights", "KV cache", "activations", "total", "weights file")
    rows = {
        f"{name} on a {device}": {**memory, "file": card.checkpoint_weights[name]}
        for name, memories in card.inference.items()
        for device, memory in memories.items()
    }
    _print_memory(f"Inference, one sequence of {card.block_size} tokens", columns, rows)


def _print_memory(title: str, columns: tuple[str, ...], rows: Mapping[str, Mapping[str, int]]) -> None:
    from litgpt_moe_ext.cli.output import print_table

    unit, size = _unit(max(value for memory in rows.values() for value in memory.values()))
    cells = [(name, *(f"{value / size:.1f}" for value in memory.values())) for name, memory in rows.items()]
    print_table(f"{title}; {unit}", columns, cells)


def _flops(number: float) -> str:
    return f"{abbreviated(number, 'kMGT', ' ')}FLOP"


def _unit(largest: float) -> tuple[str, int]:
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if largest >= size:
            return name, size
    return "bytes", 1


def _size(number: float) -> str:
    unit, size = _unit(number)
    return f"{number / size:.1f} {unit}"
