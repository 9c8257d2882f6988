"""Groups of training arguments that LitGPT does not have."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

# How processes share the work; `training.parallel.strategies`, which imports torch, is not for parsers.
StrategyName = Literal[
    "auto",
    "ddp",
    "fsdp",
    "fsdp_shard_grad_op",
    "fsdp2",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
]


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


@dataclass
class EvaluateArgs:
    """Benchmarks of the model while it trains, logged beside the losses"""

    hellaswag: Path | None = None
    """HellaSwag's hellaswag_val.jsonl; null: no HellaSwag"""
    hellaswag_rule: Literal["build-nanogpt", "lm-eval"] = "lm-eval"
    """build-nanogpt: raw text, acc_norm per token; lm-eval: cleaned text, acc_norm per character"""
    tasks: list[Path] = field(default_factory=list)
    """Tasks of lm-eval in local YAML files"""
    every_steps: int | None = None
    """Optimizer steps between evaluations; null: after every validation"""
    max_items: int | None = None
    """Ask only the first so many questions of each; null: all"""
    batch_size: int = 32
    """Texts that go through the model at once on each device"""

    def __post_init__(self) -> None:
        for name in ("every_steps", "max_items", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluate.{name}: {value} must be at least 1")
        if self.every_steps is not None and not self.wanted:
            raise ValueError(
                f"evaluate.every_steps: {self.every_steps} evaluates nothing; set evaluate.hellaswag or evaluate.tasks"
            )

    @property
    def wanted(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.hellaswag is not None or bool(self.tasks)


@dataclass
class ScheduleArgs:
    """The learning rate over the optimizer steps, from optimizer's lr to train.min_lr"""

    name: Literal["cosine", "onecycle", "wsd", "linear", "constant", "inverse_sqrt"] = "cosine"
    """Shape after the warm-up of train.lr_warmup_steps; wsd is warm-up, stable, decay"""
    decay_fraction: float = 0.2
    """wsd: last part of the training, in which the rate falls to train.min_lr"""

    def __post_init__(self) -> None:
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"schedule.decay_fraction: {self.decay_fraction} must be above 0 and at most 1")


@dataclass
class ParameterGroupArgs:
    """What distinguishes some parameters for the optimizer"""

    no_weight_decay: list[Literal["norms", "biases", "embeddings"]] = field(default_factory=list)
    """Kinds of parameters without weight decay; biases include attention sinks"""
    router_lr_factor: float = 1.0
    """Multiplies the learning rate of the routers' gates"""

    def __post_init__(self) -> None:
        if self.router_lr_factor < 0:
            raise ValueError(f"parameter_groups.router_lr_factor: {self.router_lr_factor} must be at least 0")


@dataclass
class AnomalyArgs:
    """What happens when a step's gradient is not finite, or far larger than usual"""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A gradient norm that is NaN or infinite: end the run before the weights change, or leave the step out"""
    on_spike: Literal["stop", "skip"] = "skip"
    """The same for a gradient norm above spike_factor times the median"""
    spike_factor: float | None = None
    """Multiple of the median gradient norm of the last steps that counts as a spike; null: none does"""
    window: int = 64
    """Number of steps of which the median is taken; no step is a spike before there were as many"""
    max_consecutive: int = 8
    """Skipped steps in a row after which the run ends"""

    def __post_init__(self) -> None:
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(f"anomaly.spike_factor: {self.spike_factor} must be above 1, or null")
        for name in ("window", "max_consecutive"):
            if getattr(self, name) < 1:
                raise ValueError(f"anomaly.{name}: {getattr(self, name)} must be at least 1")


@dataclass
class EmaArgs:
    """An exponential moving average of the weights, saved as a checkpoint of its own in each checkpoint"""

    decay: float | None = None
    """Share of the old average that a step keeps, such as 0.999; null: no average"""

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay: {self.decay} must be at least 0 and below 1, or null")


@dataclass
class CheckpointArgs:
    """Which checkpoints are kept beside those of train.save_interval and the final one"""

    every_minutes: float | None = None
    """Also save when this much time has passed since the last checkpoint; null: only by steps"""
    keep_last: int | None = None
    """Number of step-* directories to keep; older ones are deleted; null: all"""
    best: bool = True
    """Keep the checkpoint of the lowest validation loss as best/"""
    on_save_error: Literal["stop", "continue"] = "stop"
    """A checkpoint that cannot be written (disk full): end the run, or go on without it"""

    def __post_init__(self) -> None:
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"checkpoint.every_minutes: {self.every_minutes} must be above 0, or null")
        if self.keep_last is not None and self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last: {self.keep_last} must be at least 1, or null for all")


@dataclass
class DistributedArgs:
    """Knobs of the strategy; one that the chosen strategy does not have is refused"""

    bucket_mb: float | None = None
    """ddp: size of the pieces in which gradients are reduced while the backward pass goes on, in MB; null: 25"""
    gradient_as_bucket_view: bool | None = None
    """ddp: gradients share the memory of those pieces, which saves a copy of all of them; null: false"""
    find_unused_parameters: bool | None = None
    """ddp: look for weights that got no gradient in a backward pass, which costs time; null: false"""
    cpu_offload: bool | None = None
    """fsdp, fsdp_shard_grad_op, fsdp2: keep weights and optimizer in the memory of the CPU; null: false"""
    forward_prefetch: bool | None = None
    """the same: gather the weights of the next block before the present one is computed; null: false"""
    overlap_comm: bool | None = None
    """deepspeed: reduce gradients while the backward pass goes on; null: true"""
    reduce_bucket_size: int | None = None
    """deepspeed: number of gradients reduced at once; null: 200000000"""
    allgather_bucket_size: int | None = None
    """deepspeed_stage_1, deepspeed_stage_2: number of updated weights fetched at once, even; null: 200000000"""
    offload_optimizer: bool | None = None
    """deepspeed: keep the optimizer's states, and take its steps, on the CPU; null: false"""
    offload_parameters: bool | None = None
    """deepspeed_stage_3: keep the weights on the CPU as well; null: false"""
    timeout_minutes: float = 10.0
    """After which a process that waits for another one gives up"""

    def __post_init__(self) -> None:
        if self.bucket_mb is not None and not self.bucket_mb > 0:
            raise ValueError(f"distributed.bucket_mb: {self.bucket_mb} must be above 0, or null")
        if self.reduce_bucket_size is not None and self.reduce_bucket_size < 1:
            raise ValueError(f"distributed.reduce_bucket_size: {self.reduce_bucket_size} must be at least 1, or null")
        size = self.allgather_bucket_size
        if size is not None and (size < 2 or size % 2):
            raise ValueError(f"distributed.allgather_bucket_size: {size} must be even and at least 2, or null")
        if not self.timeout_minutes > 0:
            raise ValueError(f"distributed.timeout_minutes: {self.timeout_minutes} must be above 0")
