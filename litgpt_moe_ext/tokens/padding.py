"""Which tokens of a batch are text, and which are padding. One rule everywhere: an id below zero is padding.

LitGPT's pretraining loop takes one tensor of rows and cuts inputs (`[:, :-1]`) and targets (`[:, 1:]`) from it. The
last token of a text is a target but has no target itself, so as an input it is padding; `PaddedRows` cuts accordingly.
Training on rows with padding thus equals training on their texts without it.

Shape legend: B batch, T tokens.
"""

import torch
from torch import Tensor

from litgpt_moe_ext.tokens.rows import Rows

# Ignored by the loss as a target, and by models as an input.
PADDING = -100


class PaddedRows(Rows):
    """Rows that may end in padding: a token without a target is `PADDING` among the inputs."""

    def inputs(self, rows: slice, end: int) -> Tensor:
        """Return the inputs of some rows."""
        ids = self.as_subclass(Tensor)[rows]
        return ids[:, :end].masked_fill(ids[:, 1 : end + 1] < 0, PADDING)


def mark_padding(ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Return token ids with `PADDING` in place of those that are not text, as models expect.

    Args:
        ids_BT: Token ids.
        real_BT: True for text, bool.
    """
    return ids_BT.masked_fill(~real_BT, PADDING)


_accepted = False


def accept_padding(accepted: bool = True) -> None:
    """Let models of LitGPT's class accept ids below zero from now on, or refuse them again.

    Their outputs at padding are meaningless. MoE layers of this package ignore padding. It must come after the text of
    its row, where causal attention hides it from the text.
    """
    global _accepted
    _accepted = accepted


def accepts_padding() -> bool:
    """Return the last setting of `accept_padding`."""
    return _accepted


def real_tokens(ids_BT: Tensor) -> Tensor | None:
    """Return which tokens are text, bool (B, T); None if all are, or if padding is not accepted.

    Does not wait for a device: for ids there, and under `torch.compile`, the result is a tensor even if all are text.
    """
    if not _accepted or ids_BT.is_meta:
        return None
    real_BT = ids_BT >= 0
    seen = ids_BT.device.type == "cpu" and not torch.compiler.is_compiling()
    # Tensors without data, used to count memory, stand for text.
    return None if seen and (type(ids_BT) is not Tensor or bool(real_BT.all())) else real_BT
