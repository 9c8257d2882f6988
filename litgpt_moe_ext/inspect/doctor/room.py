"""Checks of memory and disk space for a run."""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.doctor.finding import Finding
from litgpt_moe_ext.inspect.doctor.places import existing
from litgpt_moe_ext.inspect.doctor.run_here import computing, holds_whole_model, processes
from litgpt_moe_ext.inspect.recipes import Recipe


def memory(recipe: Recipe) -> Iterator[Finding]:
    """Yield whether a training step fits into memory, or what keeps it from being counted."""
    import psutil
    import torch

    from litgpt_moe_ext.inspect.cost.layers import shorten
    from litgpt_moe_ext.inspect.cost.memory import PRECISIONS, graph_memory, training_memory
    from litgpt_moe_ext.inspect.cost.sharding import block_sizes, process_memory
    from litgpt_moe_ext.kernels.launch import triton_works_on
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision

    cuda = torch.cuda.is_available()
    settings = recipe.settings
    precision = settings.precision or default_precision(accelerator_here())
    if precision not in PRECISIONS or recipe.sequence_length > recipe.config.block_size:
        return  # reported by other checks
    per_node = processes(recipe)
    offload = bool(settings.distributed.cpu_offload or settings.distributed.offload_optimizer)
    try:
        short = shorten(recipe.config)
        kernel_loss = cuda and triton_works_on(torch.device("cuda", torch.cuda.current_device()))
        whole = training_memory(short, replace(recipe.step(precision), kernel_loss=kernel_loss))
        sizes = block_sizes(short, PRECISIONS[precision][0].itemsize)
        one = process_memory(whole, sizes, settings.strategy, per_node, settings.num_nodes, offload)
    except ValueError as error:
        yield Finding("memory", "problem", str(error))
        return
    # On a CPU all processes of a node share one memory.
    needed = one.total - one.host if cuda else per_node * one.total
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    among = " on each GPU" if cuda and per_node > 1 else f" in {per_node} processes" if per_node > 1 else ""
    text = f"training in {precision} takes about {needed / 2**30:.2f} GiB of tensors{among}"
    text += f", {free / 2**30:.1f} GiB are free"
    if cuda and per_node * settings.num_nodes == 1:
        text += f"; CUDA graphs, where tried, want {graph_memory(short, whole, precision) / 2**30:.2f} more"
    if needed > free:
        yield Finding("memory", "problem", f"{text}; {'; '.join(_remedies(recipe, cuda))}")
    else:
        yield Finding("memory", "good", text)
    if cuda and not holds_whole_model(recipe):
        yield from _making(recipe, PRECISIONS[precision][0].itemsize, per_node)


def _making(recipe: Recipe, width: int, per_node: int) -> Iterator[Finding]:
    """Yield where a model is made that is sharded afterwards, unless every GPU has room for the whole of it."""
    import torch

    from litgpt_moe_ext.machine import memory_bytes
    from litgpt_moe_ext.model_size import count_parameters
    from litgpt_moe_ext.training.parallel.facts import facts_of
    from litgpt_moe_ext.training.parallel.memory import place_of_whole

    strategy, host = recipe.settings.strategy, memory_bytes()
    needs_device = facts_of(strategy).zero_stage is not None
    whole = count_parameters(recipe.config, recipe.tie_embeddings).total * width
    total = torch.cuda.mem_get_info()[1]
    each = math.inf if host is None else host / per_node
    text = f"the whole model takes {whole / 2**30:.2f} GiB, and a GPU here has {total / 2**30:.1f}"
    match place_of_whole(whole, total, None if needs_device else each):
        case "cpu":
            yield Finding("memory", "good", f"{text}: it is made in the memory of the CPU and sharded from there")
        case None if needs_device:
            remedy = "use fsdp2 over several devices, if need be with distributed.cpu_offload"
            yield Finding("memory", "problem", f"{text}, where {strategy} needs it before sharding; {remedy}")
        case None:
            text += f", the CPU {each / 2**30:.1f} for each process, where {strategy} needs it before sharding"
            yield Finding("memory", "problem", f"{text}; start fewer processes on each node")


def _remedies(recipe: Recipe, cuda: bool) -> Iterator[str]:
    from litgpt_moe_ext.inspect.cost.memory import fusing_choices

    settings = recipe.settings
    yield f"lower train.micro_batch_size ({settings.train.micro_batch_size})"
    if settings.activation_checkpointing != "full":
        yield f"set activation_checkpointing ({settings.activation_checkpointing}) to full"
    whole = holds_whole_model(recipe)
    if whole and not settings.fused_cross_entropy and True in fusing_choices(recipe.config):
        yield "set fused_cross_entropy to true"
    if cuda and whole:
        yield "share the model among several GPUs with strategy: fsdp2"


def disk(recipe: Recipe) -> Finding:
    """Return whether two training checkpoints fit on the disk."""
    from litgpt_moe_ext.inspect.cost.optimizer_state import state_of_modules, state_ratio
    from litgpt_moe_ext.meta.models import meta_model

    place = existing(recipe.settings.out_dir, os.path.exists)
    free = shutil.disk_usage(place).free
    _, dtype, _ = computing(recipe)
    model = meta_model(recipe.config, recipe.tie_embeddings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        ratio = state_ratio(recipe.settings.optimizer, dtype)
    except SettingsError:  # reported by another check
        ratio = 2
    remembered = state_of_modules(recipe.settings.optimizer, model, ratio)(model)
    # Parameters, the optimizer's state, and an average of the weights in float32.
    checkpoint = dtype.itemsize * (parameters + remembered) + (4 * parameters if recipe.averages else 0)
    text = f"a training checkpoint takes about {checkpoint / 2**30:.2f} GiB, {free / 2**30:.1f} GiB are free in {place}"
    if free < 2 * checkpoint:
        return Finding(
            "disk", "problem", f"{text}; two must fit, since a new one is written before an old one is deleted"
        )
    return Finding("disk", "good", text)
