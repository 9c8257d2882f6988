"""What a strategy needs: its knobs, devices and packages. Judged without importing lightning."""

from dataclasses import fields
from importlib.util import find_spec

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.settings import DistributedArgs, StrategyName

_KNOBS_OF_ALL = ("timeout_minutes",)


def single_process_note(name: StrategyName, processes: int, args: DistributedArgs) -> str | None:
    """Return what to tell a user who asked for a sharded strategy with one process, or None."""
    facts = facts_of(name)
    if processes > 1 or facts.alone or not facts.shards:
        return None
    offload = ", and distributed.cpu_offload has no effect" if args.cpu_offload else ""
    return f"strategy: {name} has nothing to shard in a single process: it becomes auto{offload}"


def check_strategy(name: str, args: DistributedArgs, accelerator: str) -> None:
    """Raise an error if a strategy does not work here or lacks a knob that is set.

    Args:
        name: As in recipes.
        args: The knobs.
        accelerator: Device type.

    Raises:
        SettingsError: If the name, a knob or the device does not fit, or a package is missing.
    """
    facts = facts_of(name)
    for knob in fields(args):
        value = getattr(args, knob.name)
        if value is not None and knob.name not in (*_KNOBS_OF_ALL, *facts.knobs):
            own = ", ".join(f"distributed.{knob}" for knob in facts.knobs)
            raise SettingsError(
                f"distributed.{knob.name}: {value} would be ignored because strategy: {name} has no such setting; it "
                f"has {own}"
            )
    if facts.cuda_only and accelerator != "cuda":
        raise SettingsError(
            f"strategy: {name!r} needs CUDA devices, and there is none; ddp and fsdp2 also work on CPUs"
        )
    if facts.package is not None and find_spec(facts.package) is None:
        raise SettingsError(
            f"strategy: {name!r} needs the package {facts.package}, which is not installed; `uv sync --extra "
            f"{facts.package}` installs it"
        )
