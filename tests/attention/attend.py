"""`sink_attention` with its settings spelt out."""

from torch import Tensor

from litgpt_moe_ext.attention import sinks as module
from litgpt_moe_ext.attention.sinks import Softmax


def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Return what the package's function returns."""
    return module.sink_attention(q, k, v, Softmax(sinks, scale, dropout, backend), mask, causal)
