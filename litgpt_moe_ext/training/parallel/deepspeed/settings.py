"""DeepSpeed's configuration."""

from typing import Any

from litgpt_moe_ext.training.parallel.facts import StrategyFacts
from litgpt_moe_ext.training.settings import DistributedArgs


def engine_options(facts: StrategyFacts, args: DistributedArgs) -> dict[str, Any]:
    """Return the arguments of Fabric's `DeepSpeedStrategy`; unset options keep Fabric's defaults.

    Args:
        facts: The strategy's row of the table of facts.
        args: The options, which have the names of these arguments.
    """
    chosen = {name: value for name in facts.options if (value := getattr(args, name)) is not None}
    # Copies to and from the GPU overlap with computation only from page-locked memory.
    pinned = bool(args.offload_optimizer or args.offload_parameters)
    return {"stage": facts.zero_stage, "pin_memory": pinned, **chosen}


def step_options(micro_batch_size: int, accumulation: int, max_norm: float | None, precision: str) -> dict[str, Any]:
    """Return the entries of DeepSpeed's configuration that define an optimizer step.

    Args:
        micro_batch_size: Sequences per iteration on one process.
        accumulation: Iterations per optimizer step.
        max_norm: Maximum gradient norm; larger gradients are scaled down to it. None: no clipping.
        precision: Name of the precision, as in recipes.
    """
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": float(max_norm or 0),  # 0 is none
        # torch's optimizers also run on CPUs (AdamW with a fused kernel); DeepSpeed would require its own, which is
        # compiled at first use.
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16-mixed":
        # By default DeepSpeed accumulates gradients in the dtype of its working weights, which loses small ones.
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options
