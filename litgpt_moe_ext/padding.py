"""Which tokens of a batch are text, and which are padding. One rule everywhere: an id below zero is padding.

LitGPT's pretraining loop takes one tensor of rows and cuts inputs (`[:, :-1]`) and targets (`[:, 1:]`) from it. The
last token of a text is a target and has none itself, so as an input it is padding, however it is as a target:
`PaddedRows` cuts accordingly. A batch of rows with padding is thereby the same training as its texts without.

Shape legend: B batch, T tokens.
"""

import torch
from torch import Tensor

from litgpt_moe_ext.rows import Rows

# What the loss leaves out as a target, and models as an input.
PADDING = -100


class PaddedRows(Rows):
    """Rows of which some end in padding: a token without a target is `PADDING` among the inputs."""

    def inputs(self, rows: slice, end: int) -> Tensor:
        """Return the inputs of some rows."""
        ids = self.as_subclass(Tensor)[rows]
        return ids[:, :end].masked_fill(ids[:, 1 : end + 1] < 0, PADDING)


def mark_padding(ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Return token ids that tell models which of them are text: those that are not become `PADDING`.

    Args:
        ids_BT: Token ids.
        real_BT: True for text, bool.
    """
    return ids_BT.masked_fill(~real_BT, PADDING)


_accepted = False


def accept_padding(accepted: bool = True) -> None:
    """Let models of LitGPT's class take ids below zero from now on, or no more; elsewhere they are an error.

    Their outputs at padding are meaningless. MoE layers of this package leave padding out of everything. It must stand
    behind the text of its row, where causal attention keeps it from the tokens that count.
    """
    global _accepted
    _accepted = accepted


def accepts_padding() -> bool:
    """Return what `accept_padding` said last."""
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
