"""The formats by name: `hf` for transformers, `gguf` for llama.cpp."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


def export(checkpoint_dir: Path, out_dir: Path, name: str, dtype: str | None = None) -> list[str]:
    """Write a checkpoint in a format.

    Args:
        checkpoint_dir: A LitGPT checkpoint.
        out_dir: The new directory.
        name: The format.
        dtype: Floating type of the weights; None keeps theirs.

    Returns:
        Lines for the user; the last says what was written.

    Raises:
        SettingsError: If the model cannot be exported, or a directory is unsuitable.
    """
    if name == "gguf":
        from litgpt_moe_ext.export.gguf.write import export_gguf

        return export_gguf(checkpoint_dir, out_dir, dtype)
    from litgpt_moe_ext.export.hf.write import export_checkpoint

    return export_checkpoint(checkpoint_dir, out_dir, dtype).lines


def check_exportable(config: "Config", name: str) -> None:
    """Raise SettingsError if a trained model of a configuration cannot be exported in a format."""
    from litgpt_moe_ext.export.facts import facts_of
    from litgpt_moe_ext.export.source import with_own_experts

    config = with_own_experts(config)
    # A balancing bias that moves will differ between experts.
    facts = facts_of(config, {})
    facts = dataclasses.replace(facts, balancing_bias=bool(config.router_bias_update_rate))
    if name == "gguf":
        from litgpt_moe_ext.export.gguf.write import choose_graph, require_package

        require_package()
        choose_graph(facts)
    else:
        from litgpt_moe_ext.export.hf.architectures import choose_class

        choose_class(facts)
