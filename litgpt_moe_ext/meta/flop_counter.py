"""Counting floating point operations on meta tensors, by torch's formulas."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.host.without_compiler import without_compiler
from litgpt_moe_ext.meta.operators import OPERATORS, make_on_meta


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
        self._without_compiler = without_compiler()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Telling torch's compiler to skip this mode would load it.
        return False

    def __enter__(self) -> "FlopCounter":
        self._without_compiler.__enter__()
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._without_compiler.__exit__(exc_type, exc_val, exc_tb)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = OPERATORS(func, args, kwargs, make_on_meta)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result
