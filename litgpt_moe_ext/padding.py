"""Which tokens of a batch are text, and which are padding. One rule everywhere: an id below zero is padding.

LitGPT's pretraining loop takes one tensor of rows and cuts inputs (`[:, :-1]`) and targets (`[:, 1:]`) from it. The
last token of a text is a target and has none itself, so as an input it is padding, however it is as a target:
`PaddedRows` cuts accordingly. A batch of rows with padding is thereby the same training as its texts without.

Shape legend: B batch, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What the loss leaves out as a target, and models as an input.
PADDING = -100


class PaddedRows(Tensor):
    """Rows of which some end in padding: integers, (B, T + 1), the last column a target only.

    A slice of columns that starts at the first and leaves the last out is the inputs: a token without a target is
    `PADDING` there. All other results are ordinary tensors, except that copies and moves to a device stay rows.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns for ordinary tensors, with the two exceptions of the class."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func is Tensor.__getitem__ and (end := _end_of_inputs(*args)) is not None:
                rows, (some, _) = args
                result = result.masked_fill(rows[some, 1 : end + 1] < 0, PADDING)
            if func in _COPIES and isinstance(args[0], PaddedRows):
                return result.as_subclass(PaddedRows)
            return result.as_subclass(Tensor) if isinstance(result, PaddedRows) else result


_COPIES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.clone, Tensor.contiguous, Tensor.long}


def _end_of_inputs(rows: Tensor, index: Any) -> int | None:
    # Where the slice of columns that is meant ends, or None for another index.
    if not (isinstance(index, tuple) and len(index) == 2 and all(isinstance(part, slice) for part in index)):
        return None
    start, end, step = index[1].indices(rows.size(1))
    return end if (start, step) == (0, 1) and 0 < end < rows.size(1) else None


@dataclass(frozen=True, slots=True)
class Padded:
    """What a block gets as its attention mask when some of its tokens are padding.

    Attributes:
        real_BT: True for text, bool.
        mask: The mask itself.
    """

    real_BT: Tensor
    mask: Any


def mark_padding(ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Return token ids that tell models which of them are text: those that are not become `PADDING`.

    Args:
        ids_BT: Token ids.
        real_BT: True for text, bool.
    """
    return ids_BT.masked_fill(~real_BT, PADDING)


_accepted = False


def accept_padding() -> None:
    """Let models of LitGPT's class take ids below zero from now on; elsewhere they are an error.

    Their outputs at padding are meaningless. MoE layers of this package leave padding out of everything. It must stand
    behind the text of its row, where causal attention keeps it from the tokens that count.
    """
    global _accepted
    _accepted = True


def accepts_padding() -> bool:
    """Return whether `accept_padding` was called."""
    return _accepted


def real_tokens(ids_BT: Tensor) -> Tensor | None:
    """Return which tokens are text, bool (B, T); None where all are, or where padding is not accepted.

    Nothing waits for a device: there, and under `torch.compile`, all tokens being text is not noticed.
    """
    if not _accepted or ids_BT.is_meta:
        return None
    real_BT = ids_BT >= 0
    seen = ids_BT.device.type == "cpu" and not torch.compiler.is_compiling()
    # Tensors without data, with which memory is counted, stand for text.
    return None if seen and (type(ids_BT) is not Tensor or bool(real_BT.all())) else real_BT
