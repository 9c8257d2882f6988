"""Groups of training arguments that LitGPT does not have."""

from dataclasses import dataclass, field


@dataclass
class SampleArgs:
    """Text written by the model after every validation"""

    prompts: list[str] = field(default_factory=list)
    """Prompts to continue; none: no samples"""
    max_new_tokens: int = 80
    """Tokens to generate per prompt"""
    temperature: float = 0.8
    """Divides the logits before sampling; 0 takes the likeliest token"""
    top_k: int | None = 50
    """Sample among this many likeliest tokens only"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"sample.max_new_tokens: {self.max_new_tokens} must be at least 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sample.top_k: {self.top_k} must be at least 1, or null to sample among all tokens")
        if self.temperature < 0:
            raise ValueError(f"sample.temperature: {self.temperature} must be at least 0")
