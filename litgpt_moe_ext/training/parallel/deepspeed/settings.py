"""What DeepSpeed is configured with."""

from typing import Any

from litgpt_moe_ext.training.settings import DistributedArgs


def engine_options(stage: int, args: DistributedArgs) -> dict[str, Any]:
    """Return the arguments of Fabric's `DeepSpeedStrategy`; what is not set keeps Fabric's default.

    Args:
        stage: ZeRO stage, 1 to 3.
        args: The knobs.
    """
    chosen = {
        "overlap_comm": args.overlap_comm,
        "reduce_bucket_size": args.reduce_bucket_size,
        "allgather_bucket_size": args.allgather_bucket_size,
        "offload_optimizer": args.offload_optimizer,
        "offload_parameters": args.offload_parameters,
    }
    # Copies to and from the GPU overlap with computation from page-locked memory only.
    pinned = bool(args.offload_optimizer or args.offload_parameters)
    return {
        "stage": stage,
        "pin_memory": pinned,
        **{name: value for name, value in chosen.items() if value is not None},
    }


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
