"""`litgpt validate` on checkpoints of models that need the plugin."""

from typing import Any

from litgpt_moe_ext.config.fields import uses_plugin
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE, REQUIRES_MARK, refuse_unknown_fields
from litgpt_moe_ext.host.replaced import wrapping


def accept_mark(module: Any) -> None:
    """Accept the mark of a checkpoint that needs the plugin: the command builds its configuration by hand."""

    @wrapping(module, "Config")
    def config(original: Any, **fields: Any) -> Any:
        if REQUIRES_MARK in fields:
            refuse_unknown_fields(fields, CONFIG_FILE)
        return original(**{name: value for name, value in fields.items() if name != REQUIRES_MARK})


def count_all_parameters(utils: Any) -> None:
    """Estimate memory from the parameters that a model of the plugin has; LitGPT's formula knows no experts."""

    @wrapping(utils, "estimate_model_memory")
    def estimate_model_memory(
        original: Any, config: Any, dtype: Any = "float32", training: bool = False
    ) -> dict[str, Any]:
        found = original(config, dtype, training)
        if uses_plugin(config):
            import torch

            from litgpt_moe_ext.model_size import count_parameters

            named = {"float16": torch.float16, "bfloat16": torch.bfloat16}
            count = count_parameters(config).total
            memory = count * (named.get(dtype, torch.float32) if isinstance(dtype, str) else dtype).itemsize / 1024**3
            total = memory * (4 if training else 1)  # LitGPT's rule: weights, gradients, two moments
            found |= {"param_count": count, "param_memory_gb": round(memory, 2), "estimated_total_gb": round(total, 2)}
            if found["available_gpu_memory_gb"] is not None:
                found["fits_in_memory"] = total < found["available_gpu_memory_gb"]
        return found
