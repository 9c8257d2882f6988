"""What DeepSpeed is configured with, and what cannot be combined with it."""

from typing import Any

from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.settings import AnomalyArgs, DistributedArgs, EmaArgs

# DeepSpeed hands the optimizer flat pieces of several weights. That is all the same to these, which treat every number
# by itself; one that looks at rows, matrices or whole weights would compute something else without a word.
ELEMENTWISE_OPTIMIZERS = (
    *("torch.optim." + name for name in ("Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")),
    "deepspeed.ops.adam.DeepSpeedCPUAdam",
    "deepspeed.ops.adam.FusedAdam",
    "deepspeed.ops.lion.DeepSpeedCPULion",
    "deepspeed.ops.lion.FusedLion",
)


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


def check_combination(
    strategy: str,
    precision: str | None,
    optimizer: str | dict,
    compile: bool | str,
    activation_checkpointing: str,
    anomaly: AnomalyArgs,
    ema: EmaArgs,
) -> None:
    """Raise ValueError if a setting of a run cannot be combined with its strategy; only DeepSpeed has such settings.

    Args:
        strategy: As in recipes, and so are the others.
    """
    stage = facts_of(strategy).zero_stage
    if stage is None:
        return
    if precision == "bf16-true":
        raise ValueError(
            f"precision: 'bf16-true' cannot be combined with strategy: {strategy!r}, whose optimizer always keeps "
            "float32 weights; use bf16-mixed, which keeps bfloat16 ones for everything else"
        )
    path = optimizer["class_path"] if isinstance(optimizer, dict) else optimizer
    if _full_path(path) not in ELEMENTWISE_OPTIMIZERS:
        raise ValueError(
            f"optimizer: {path!r} cannot be combined with strategy: {strategy!r}, which hands it flat pieces of "
            f"several weights; use one that treats every number by itself: {', '.join(ELEMENTWISE_OPTIMIZERS)}"
        )
    if compile is True:
        raise ValueError(
            f"compile: true cannot be combined with strategy: {strategy!r}; leave it at auto, or use fsdp2"
        )
    if stage == 3 and activation_checkpointing == "selective":
        raise ValueError(
            f"activation_checkpointing: 'selective' cannot be combined with strategy: {strategy!r}, which gives "
            "weights back between the forward pass and its repetition; use full, or stage 2"
        )
    if anomaly.spike_factor is not None:
        raise ValueError(
            f"anomaly.spike_factor: {anomaly.spike_factor} cannot be combined with strategy: {strategy!r}, which "
            "computes the gradient norm inside the optimizer step; use null, or ddp or fsdp2. Gradients that are not "
            "finite are watched over here as well"
        )
    if ema.decay is not None:
        raise ValueError(
            f"ema.decay: {ema.decay} cannot be combined with strategy: {strategy!r}; use null, or ddp or fsdp2"
        )


def _full_path(optimizer: str) -> str:
    # torch's optimizers also have the path of the file that they are in.
    module, _, name = optimizer.rpartition(".")
    return f"torch.optim.{name}" if module in ("", f"torch.optim.{name.lower()}") else optimizer
