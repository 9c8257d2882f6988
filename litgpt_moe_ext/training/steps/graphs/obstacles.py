"""Obstacles to CUDA graphs that show only at run time: waits, hooks, lack of memory, errors."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn


class GraphError(RuntimeError):
    """A reason not to use CUDA graphs; its message is shown as it is."""


def reason_of(error: Exception) -> str:
    """Return in one line why there are no graphs."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, GraphError):
        return text
    kind = "" if text and isinstance(error, RuntimeError) else type(error).__name__
    return f"capturing failed: {': '.join(filter(None, (kind, text)))}"


@contextlib.contextmanager
def noting_waits(places: list[str]) -> Iterator[None]:
    """Note where the host waits for the device in a scope, as `file:line`."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    for warning in noted:
        if "called a synchronizing" in str(warning.message):
            places.append(f"{warning.filename}:{warning.lineno}")
        elif "debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


# Where modules and parameters keep their hooks.
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip


def hook_of_others(model: nn.Module) -> str | None:
    """Return a description of a hook that is not this package's, or None; replays would not call it."""
    for name, part in (*model.named_modules(), *model.named_parameters()):
        for hook in (hook for kind in _HOOKS for hook in (getattr(part, kind, None) or {}).values()):
            if not (getattr(hook, "__module__", None) or "").startswith("litgpt_moe_ext."):
                return f"a hook on {name.removeprefix('_forward_module.') or 'the model'} would not run in every pass"
    return None


def lack_of_memory(device: torch.device, more: int = 0) -> str | None:
    """Return a description of the missing memory if passes with and without graphs do not fit side by side, or None.

    Args:
        device: The device.
        more: Bytes that graphs need besides the memory of the passes.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    passes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    needed = torch.cuda.max_memory_allocated(device) + passes + more
    if needed <= room:
        return None
    return f"with them {needed / 2**30:.1f} GiB would be needed, {room / 2**30:.1f} are there"
