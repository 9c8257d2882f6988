"""What DeepSpeed is configured with."""

from typing import Any

from litgpt_moe_ext.training.parallel.facts import StrategyFacts
from litgpt_moe_ext.training.settings import DistributedArgs


def engine_options(facts: StrategyFacts, args: DistributedArgs) -> dict[str, Any]:
    """Return the arguments of Fabric's `DeepSpeedStrategy`; what is not set keeps Fabric's default.

    Args:
        facts: The strategy's row of the table.
        args: The knobs, which have the names of these arguments.
    """
    chosen = {name: value for name in facts.knobs if (value := getattr(args, name)) is not None}
    # Copies to and from the GPU overlap with computation from page-locked memory only.
    pinned = bool(args.offload_optimizer or args.offload_parameters)
    return {"stage": facts.zero_stage, "pin_memory": pinned, **chosen}


def step_options(micro_batch_size: int, accumulation: int, max_norm: float | None, precision: str) -> dict[str, Any]:
    """Return the entries of DeepSpeed's configuration that say what an optimizer step is.

    Args:
        micro_batch_size: Sequences of an iteration on one process.
        accumulation: Iterations of an optimizer step.
        max_norm: Gradients with a larger norm are scaled down to it, or None.
        precision: As in recipes.
    """
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": float(max_norm or 0),  # 0 is none
        # torch's own optimizers also run on CPUs (AdamW with a fused kernel); DeepSpeed insists on its own, which it
        # compiles at the first use.
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16-mixed":
        # DeepSpeed adds up micro batches in the format of its working weights, where small ones are lost.
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options
