"""Which experts write each token of a text."""

from collections.abc import Iterator
from dataclasses import dataclass

from litgpt import GPT

from litgpt_moe_ext.inspect.experts.capture import LayerRouting, RoutingRecorder


@dataclass(frozen=True)
class Written:
    """One new token.

    Attributes:
        id: Token id.
        experts: For each MoE layer the experts that computed it, the one with the highest gate value first. These are
            the experts of the position that predicts the token.
    """

    id: int
    experts: list[list[int]]


def with_experts(model: GPT, tokens: Iterator[int]) -> Iterator[Written]:
    """Say which experts wrote each token.

    Args:
        model: The model that writes.
        tokens: Its output, from `litgpt_moe_ext.evaluation.streaming.stream`.

    Yields:
        The tokens with their experts.

    Raises:
        SettingsError: If the model has no MoE layers.
    """
    recorder = RoutingRecorder(model)
    with recorder.recording():
        for token in tokens:
            yield Written(token, [_by_weight(layer) for layer in recorder.take()])


def _by_weight(layer: LayerRouting) -> list[int]:
    order_K = layer.weights_NK[-1].argsort(descending=True)
    return layer.experts_NK[-1][order_K].tolist()
