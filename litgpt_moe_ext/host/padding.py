"""Padding in LitGPT's finetuning, whose batches are filled up with token 0."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from litgpt_moe_ext.config.features import MOE_CLASS_NAMES


@dataclass(frozen=True)
class _MarkPadding:
    # Collates samples, and says which of the inputs are padding. (Processes of a data loader get a copy.)
    collate: Callable[[list[Any]], dict[str, Any]]

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        import torch

        from litgpt_moe_ext.padding import mark_padding

        batch = self.collate(samples)
        ids_BT = batch["input_ids"]
        # Labels do not tell: those of a prompt are masked, and it is text all the same.
        length_B1 = batch["token_counts"]["raw_plus_prompt_template"]
        batch["input_ids"] = mark_padding(ids_BT, torch.arange(ids_BT.size(1)) < length_B1)
        return batch


def mark_finetuning_padding(loop: Any) -> None:
    """Have the batches of a finetuning loop of LitGPT say what is padding, where the model has MoE layers."""
    original = loop.fit

    @wraps(original)
    def fit(*, state: dict[str, Any], train_dataloader: Any, val_dataloader: Any, **kwargs: Any) -> Any:
        from litgpt_moe_ext.padding import accept_padding

        if state["model"].config.mlp_class_name in MOE_CLASS_NAMES:
            accept_padding()
            for loader in (train_dataloader, val_dataloader):
                # Fabric's loader hands on the batches of the one that it wraps.
                loader = getattr(loader, "_dataloader", loader)
                loader.collate_fn = _MarkPadding(loader.collate_fn)
        return original(state=state, train_dataloader=train_dataloader, val_dataloader=val_dataloader, **kwargs)

    loop.fit = fit
