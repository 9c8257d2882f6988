"""Counting floating point operations on meta tensors, by torch's formulas."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.meta.kernels import call


class FlopCounter(TorchDispatchMode):
    """Counts the floating point operations of operators on meta tensors within its scope.

    `torch.utils.flop_counter.FlopCounterMode` counts the same, for any tensors, but loads torch's compiler.

    Attributes:
        total: Number of operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.total = 0
        self._formulas = flop_registry

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Telling torch's compiler to skip this mode would load it.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = call(func, *args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result
