"""`litgpt-moe model-card`."""

from pathlib import Path


def model_card(
    model: Path,
    micro_batch_size: int | None = None,
    devices: int | None = None,
    num_nodes: int | None = None,
    json: Path | None = None,
) -> None:
    """Parameters, FLOPs per token and memory of a model, from its recipe, before anything is trained.

    Args:
        model: A recipe (YAML file) or a checkpoint directory.
        micro_batch_size: Sequences per forward pass in training. Default: what the recipe says.
        devices: Processes on each node, for the memory of one of them by strategy. Default: what the recipe says.
        num_nodes: Nodes. Default: what the recipe says.
        json: File to write the figures to, in bytes.
    """
    for name, value in (("micro_batch_size", micro_batch_size), ("devices", devices), ("num_nodes", num_nodes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value} must be at least 1")
    import litgpt_moe_ext
    from litgpt_moe_ext.cli.commands.output import print_table, write_json

    litgpt_moe_ext.register()
    from litgpt_moe_ext.inspect.cost.model_card import make_card
    from litgpt_moe_ext.inspect.recipes import load_recipe

    card = make_card(load_recipe(model), micro_batch_size, devices, num_nodes)
    print(f"{card.name}")
    use = "is the output head as well" if card.tie_embeddings else "is only looked up"
    print(
        f"  parameters: {card.parameters_total:,} in total, {card.parameters_active:,} active per token "
        f"({card.parameters_active / card.parameters_total:.1%}; {card.parameters_embedding:,} are the token "
        f"embedding, which {use})"
    )
    print(
        f"  FLOPs per token, in sequences of {card.sequence_length}: {_count(card.flops_per_token_forward)} forward, "
        f"{_count(card.flops_per_token_training)} in training"
    )
    print(
        "  key/value cache per token: "
        + ", ".join(f"{_size(size)} in {name}" for name, size in card.kv_cache_per_token.items())
    )
    unit, size = _unit(max(memory["total"] for memory in card.training.values()))
    mode = card.activation_checkpointing
    savers = "" if mode == "none" else f", activation checkpointing {mode}"
    savers += ", fused cross-entropy" if card.fused_cross_entropy else ""
    tokens = f"{card.micro_batch_size} x {card.sequence_length} tokens per micro batch"
    title = f"\nTraining, {tokens}, {card.optimizer}{savers}; {unit}"
    columns = ("precision", "weights", "grads", "optimizer", "activations", "total", "checkpoint")
    rows = [
        (name, *(f"{value / size:.1f}" for value in (*memory.values(), card.checkpoint_training[name])))
        for name, memory in card.training.items()
    ]
    print_table(title, columns, rows)
    _print_processes(card)
    unit, size = _unit(max(card.activations.values()))
    row = [(card.precision, *(f"{value / size:.1f}" for value in card.activations.values()))]
    title = f"Activations by activation_checkpointing and fused_cross_entropy; {unit}"
    print_table(title, ("precision", *card.activations), row)
    unit, size = _unit(max(memory["total"] for memory in card.inference.values()))
    columns = ("dtype", "weights", "KV cache", "activations", "total", "weights file")
    rows = [
        (name, *(f"{value / size:.1f}" for value in (*memory.values(), card.checkpoint_weights[name])))
        for name, memory in card.inference.items()
    ]
    print_table(f"Inference, one sequence of {card.block_size} tokens; {unit}", columns, rows)
    print("Tensors only: the runtime itself, libraries' workspaces and the allocator's reserve come on top.")
    if json is not None:
        write_json(json, card.to_dict())


def _print_processes(card) -> None:
    if not card.processes:
        return
    from litgpt_moe_ext.cli.commands.output import print_table

    unit, size = _unit(max(memory["total"] for memory in card.processes.values()))
    nodes = f" on each of {card.num_nodes} nodes" if card.num_nodes > 1 else ""
    columns = ("strategy", "weights", "grads", "optim.", "comm.", "activations", "total")
    keys = ("weights", "gradients", "optimizer", "communication", "activations", "total")
    rows = [(name, *(f"{memory[key] / size:.1f}" for key in keys)) for name, memory in card.processes.items()]
    print_table(f"Each of {card.devices} processes{nodes}, {card.precision}; {unit}", columns, rows)


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}FLOP"
    return f"{number:.0f} FLOP"


def _unit(largest: float) -> tuple[str, int]:
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if largest >= size:
            return name, size
    return "bytes", 1


def _size(number: float) -> str:
    unit, size = _unit(number)
    return f"{number / size:.1f} {unit}"
