"""How the next token is chosen.

Shape legend: B batch, V vocabulary.
"""

from dataclasses import dataclass

import torch
from litgpt.generate.base import sample
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError


@dataclass(frozen=True)
class Sampling:
    """A rule for choosing tokens.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Choose only among this many likeliest tokens, or None.
        top_p: Choose among the likeliest tokens that together have this probability.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SettingsError(f"temperature: {self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise SettingsError(f"top_k: {self.top_k} must be at least 1, or null for all tokens")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p: {self.top_p} must be more than 0 and at most 1")

    def choose(self, logits_BV: Tensor) -> Tensor:
        """Return a token for each row of logits, (B,), int64."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        rows = (sample(logits_V.view(1, 1, -1), self.temperature, self.top_k, self.top_p) for logits_V in logits_BV)
        return torch.cat([token.view(1) for token in rows]).long()


GREEDY = Sampling(temperature=0.0, top_k=None)
"""Always the likeliest token."""
