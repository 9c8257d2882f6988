"""The recipes whose models are trained, and what these are compared with."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from litgpt import Config
from torch import Tensor

from litgpt_moe_ext.config.fields import added_fields, expert_fields

_FOLDER = Path(__file__).resolve().parents[3] / "configs"
RECIPES = ("quickstart", "code-moe-60m", "moe-200m-tinystories")
RECOMPUTED = ("code-moe-800m",)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and its batches.

    Args:
        name: Of the recipe.
        settings: The model's.
        micro_batch: Rows of a micro-batch.
        accumulation: How many of these a step has on one card, at most four.
    """

    name: str
    settings: dict[str, Any]
    micro_batch: int
    accumulation: int

    @property
    def length(self) -> int:
        return self.settings["block_size"]

    def batches(self, device: torch.device, accumulation: int | None = None) -> Tensor:
        """Return token ids of the micro-batches of a step, or of so many, (A, B, T + 1)."""
        size = (accumulation or self.accumulation, self.micro_batch, self.length + 1)
        return torch.randint(0, self.settings["vocab_size"], size, device=device)


def recipes(tiny: bool, names: tuple[str, ...] = RECIPES) -> list[Recipe]:
    return [load(name, tiny) for name in (names[:1] if tiny else names)]


def load(name: str, tiny: bool) -> Recipe:
    """Return a recipe, with a toy for its model if wanted."""
    content = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    settings, train = content["model_config"], content["train"]
    if tiny:
        settings |= {"n_layer": 1, "n_embd": 64, "block_size": 64, "moe_intermediate_size": 32, "vocab_size": 128}
        settings |= {"padded_vocab_size": 128, "first_k_dense_replace": None, "intermediate_size": 64}
        settings |= {"n_head": 4, "n_query_groups": 2, "head_size": 16}
    accumulation = min(train["global_batch_size"] // train["micro_batch_size"], 4)
    return Recipe(name, settings, 1 if tiny else train["micro_batch_size"], accumulation)


def contenders(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the model of a recipe, the same with LitGPT's `LLaMAMoE`, and its dense twin of equal active work."""
    ours = Config(**settings)
    groups = ("n_expert_groups", "n_topk_groups", "n_topk_scores_per_group", "rope_adjustments")
    plain = {name: value for name, value in settings.items() if name not in (*added_fields(), *groups)}
    width = (ours.n_expert_per_token + (ours.n_shared_expert or 0)) * ours.moe_intermediate_size
    # The twin keeps our attention, so that the experts are all that differs.
    dense = {name: value for name, value in settings.items() if name not in (*expert_fields(), "mlp_activation")}
    return {
        "ours": settings,
        "LLaMAMoE": {**plain, "mlp_class_name": "LLaMAMoE"},
        "dense twin": {**dense, "mlp_class_name": "LLaMAMLP", "intermediate_size": width},
    }
