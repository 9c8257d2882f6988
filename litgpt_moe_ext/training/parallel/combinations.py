"""Which settings of a run cannot be combined with its strategy."""

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.settings import Settings

# DeepSpeed hands the optimizer flat shards of several weights. These optimizers treat every number by itself; one that
# looks at rows, matrices or whole weights would silently compute something else.
ELEMENTWISE_OPTIMIZERS = (
    *("torch.optim." + name for name in ("Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")),
    "deepspeed.ops.adam.DeepSpeedCPUAdam",
    "deepspeed.ops.adam.FusedAdam",
    "deepspeed.ops.lion.DeepSpeedCPULion",
    "deepspeed.ops.lion.FusedLion",
)


def check_combination(settings: Settings) -> None:
    """Raise an error if a setting of a run cannot be combined with its strategy.

    Args:
        settings: All settings of the run.

    Raises:
        SettingsError: If one cannot.
    """
    facts = facts_of(settings.strategy)
    if settings.fused_cross_entropy and settings.distributed.find_unused_parameters:
        raise SettingsError(
            "distributed.find_unused_parameters: true cannot be combined with fused_cross_entropy: true, whose output "
            "head works outside the forward pass, where ddp takes it for unused; set one of them to false"
        )
    if facts.zero_stage is not None:
        _check_zero(settings, facts.zero_stage)


def _check_zero(settings: Settings, stage: int) -> None:
    where = f"cannot be combined with strategy: {settings.strategy!r}"
    if settings.precision == "bf16-true":
        raise SettingsError(
            f"precision: 'bf16-true' {where}, whose optimizer always keeps float32 weights; use bf16-mixed, which "
            "keeps bfloat16 ones for everything else"
        )
    optimizer = settings.optimizer
    path = optimizer["class_path"] if isinstance(optimizer, dict) else optimizer
    if _full_path(path) not in ELEMENTWISE_OPTIMIZERS:
        raise SettingsError(
            f"optimizer: {path!r} {where}, which hands it flat shards of several weights; use one that treats every "
            f"number by itself: {', '.join(ELEMENTWISE_OPTIMIZERS)}"
        )
    if settings.compile is True:
        raise SettingsError(f"compile: true {where}; leave it at auto, or use fsdp2")
    if stage == 3 and settings.activation_checkpointing == "selective":
        raise SettingsError(
            f"activation_checkpointing: 'selective' {where}, which gives weights back between the forward pass and its "
            "repetition; use full, or stage 2"
        )
    if settings.anomaly.spike_factor is not None:
        raise SettingsError(
            f"anomaly.spike_factor: {settings.anomaly.spike_factor} {where}, which computes the gradient norm inside "
            "the optimizer step; use null, or ddp or fsdp2. Gradients that are not finite are watched over here as well"
        )
    if settings.ema.decay is not None:
        raise SettingsError(f"ema.decay: {settings.ema.decay} {where}; use null, or ddp or fsdp2")


def _full_path(optimizer: str) -> str:
    # torch's optimizers also have the path of the file that they are in.
    module, _, name = optimizer.rpartition(".")
    return f"torch.optim.{name}" if module in ("", f"torch.optim.{name.lower()}") else optimizer
