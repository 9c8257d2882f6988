"""How a recipe would be computed: compiler, kernels, number format, processes."""

from collections.abc import Iterator

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.doctor.finding import Finding, with_warnings
from litgpt_moe_ext.inspect.doctor.run_here import compiles, computing, processes
from litgpt_moe_ext.inspect.recipes import Recipe
from litgpt_moe_ext.wording import counted


def compiling(recipe: Recipe) -> Finding:
    """Return whether a run would be compiled."""
    from litgpt_moe_ext.training.compilation import decide, obstacle
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here

    device_type, setting = accelerator_here(), recipe.settings.compile
    if setting is True and (reason := obstacle(device_type)):
        return Finding("compile", "problem", f"compile: true cannot work here: {reason}; set compile: auto")
    return Finding("compile", "good", str(decide(setting, recipe.config, device_type)))


def kernels(recipe: Recipe) -> Iterator[Finding]:
    """Yield what a run of the recipe would report about its kernels, or would refuse."""
    from litgpt_moe_ext.attention.kernels.own import EAGER
    from litgpt_moe_ext.meta.models import meta_model
    from litgpt_moe_ext.training.callbacks.kernel_report import attention_line, experts_line

    device, dtype, autocast = computing(recipe)
    model, compiled = meta_model(recipe.config).to(dtype), compiles(recipe, device.type)
    lines = {
        "experts": (lambda: experts_line(model, device, compiled), "loop", "LitGPT's own layers"),
        "attention": (lambda: attention_line(model, device), EAGER, "LitGPT's own"),
    }
    for topic, (line_of, slowest, none) in lines.items():
        try:
            with autocast:
                line, warned = with_warnings(line_of)
        except SettingsError as error:
            yield Finding(topic, "problem", str(error))
            continue
        text = none if line is None else line.removeprefix(f"{topic}: ")
        yield Finding(topic, "note" if text.startswith(slowest) else "good", text + warned)


def precision(wanted: str | None) -> Finding:
    """Return whether this device supports the precision of a recipe.

    Args:
        wanted: The recipe's `precision`.
    """
    import torch

    from litgpt_moe_ext.training.parallel.accelerator import default_precision

    cuda = torch.cuda.is_available()
    usable = ["32-true", "16-mixed"]
    if not cuda or default_precision("cuda") == "bf16-mixed":
        usable += ["bf16-mixed", "bf16-true"]
    if wanted is not None and wanted not in usable:
        return Finding(
            "precision", "problem", f"precision: {wanted} does not work on this device; use one of {', '.join(usable)}"
        )
    slow = not cuda and not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
    if slow and wanted is not None and wanted.startswith("bf16"):
        return Finding("precision", "note", f"precision: {wanted} is slow on a CPU without AVX-512; 32-true is faster")
    return Finding("precision", "good", f"{wanted or 'chosen by the device'}; usable: {', '.join(usable)}")


def strategy(recipe: Recipe) -> Finding:
    """Return how processes would share the work, or why they cannot here."""
    import torch

    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here
    from litgpt_moe_ext.training.phases.checks import check_strategy, strategy_note

    per_node, nodes = processes(recipe), recipe.settings.num_nodes
    chosen, args = recipe.settings.strategy, recipe.settings.distributed
    try:
        check_strategy(chosen, args, accelerator_here())
    except (TypeError, ValueError, ImportError) as error:
        return Finding("strategy", "problem", str(error))
    if torch.cuda.is_available() and per_node > torch.cuda.device_count():
        text = f"devices: {per_node}, but torch can use {counted(torch.cuda.device_count(), 'GPU')} here"
        return Finding("strategy", "problem", f"{text}; set devices: auto")
    if note := strategy_note(chosen, per_node * nodes, args, accelerator_here()):
        return Finding("strategy", "note", note)
    name = "ddp" if chosen == "auto" and per_node * nodes > 1 else chosen
    count = counted(per_node, "process") + (f" on each of {nodes} nodes" if nodes > 1 else "")
    return Finding("strategy", "good", f"{name}, {count}")


def graphs(recipe: Recipe, device_type: str) -> Finding:
    """Return whether passes will run as CUDA graphs.

    Args:
        recipe: The recipe.
        device_type: Where it runs.
    """
    from litgpt_moe_ext.training.parallel.facts import facts_of
    from litgpt_moe_ext.training.steps.graphs.decision import decide

    settings = recipe.settings
    facts, world_size = facts_of(settings.strategy), processes(recipe) * settings.num_nodes
    try:
        compiled = compiles(recipe, device_type)
        decision = decide(settings.cuda_graphs, device_type, facts, world_size, compiled, recipe.config)
    except SettingsError as error:
        return Finding("CUDA graphs", "problem", str(error))
    return Finding("CUDA graphs", "good", str(decision).removeprefix("CUDA graphs: "))
