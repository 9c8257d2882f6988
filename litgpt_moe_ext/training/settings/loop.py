"""Settings of the training loop: length, batches, validation, logging, learning rate, gradients, weight averaging.

`TrainArgs`, `EvalArgs` and `LogArgs` repeat the fields of the same dataclasses in `litgpt.args`, with ranges and the
defaults of `litgpt pretrain`. Importing LitGPT's own would load LitGPT for every `--help`.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from litgpt_moe_ext.field_types import (
    AboveOne,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
)
from litgpt_moe_ext.training.settings.section import Section

if TYPE_CHECKING:
    import litgpt.args


ScheduleName = Literal["cosine", "onecycle", "wsd", "linear", "constant", "inverse_sqrt"]


@dataclass
class TrainArgs(Section, key="train"):
    """Batches, length and limits of the training."""

    save_interval: PositiveInt | None = 1000
    """Optimizer steps between checkpoints; null: only the final one."""
    log_interval: PositiveInt = 1
    """Optimizer steps between log lines."""
    global_batch_size: PositiveInt = 512
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: PositiveInt = 4
    """Sequences that go through the model at once on one device."""
    lr_warmup_steps: NonNegativeInt | None = 2000
    """Optimizer steps over which the learning rate rises to its peak."""
    lr_warmup_fraction: Fraction | None = None
    """Fraction of an epoch over which the learning rate rises to its peak, instead of lr_warmup_steps."""
    epochs: PositiveInt | None = None
    """Number of passes over the data, instead of max_tokens; null: max_tokens sets the length."""
    max_tokens: PositiveInt = int(3e12)
    """Total number of tokens to train on, padding included."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; the learning rate schedule remains that of max_tokens."""
    max_time: PositiveFloat | None = None
    """Stop after this many seconds."""
    max_seq_length: PositiveInt | None = None
    """Tokens per sequence; null: the model's block_size."""
    tie_embeddings: bool | None = False
    """Whether the output head and the token embeddings share one table."""
    max_norm: PositiveFloat = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    min_lr: NonNegativeFloat = 4e-5
    """Learning rate at the end of the schedule."""

    def problems(self) -> Iterator[str]:
        """See `Section.problems`."""
        if self.lr_warmup_fraction and self.lr_warmup_steps:
            yield (
                f"train.lr_warmup_fraction: {self.lr_warmup_fraction} must be null beside train.lr_warmup_steps: "
                f"{self.lr_warmup_steps}; set one of them to null"
            )

    def for_litgpt(self) -> "litgpt.args.TrainArgs":
        """Return LitGPT's equivalent, without the epochs, which LitGPT's pretraining refuses."""
        import litgpt.args

        made = litgpt.args.TrainArgs(**asdict(self))
        made.epochs = None
        return made


@dataclass
class EvalArgs(Section, key="eval"):
    """Validation."""

    interval: PositiveInt = 1000
    """Optimizer steps between validations; larger than the number of steps: none in between."""
    max_new_tokens: PositiveInt | None = None
    """Not for pretraining; use sample.max_new_tokens."""
    max_iters: PositiveInt = 100
    """Batches per validation, on each process."""
    initial_validation: bool = False
    """Whether to validate before the first step."""
    final_validation: bool = True
    """Whether to validate after the last step."""
    evaluate_example: str | int = "first"
    """Without effect in pretraining."""

    def problems(self) -> Iterator[str]:
        """See `Section.problems`."""
        if self.max_new_tokens is not None:
            yield (
                f"eval.max_new_tokens: {self.max_new_tokens} must be null for pretraining; text is written by "
                "sample.prompts and sample.max_new_tokens"
            )

    def for_litgpt(self) -> "litgpt.args.EvalArgs":
        """Return LitGPT's equivalent."""
        import litgpt.args

        return litgpt.args.EvalArgs(**asdict(self))


@dataclass
class LogArgs(Section, key="log"):
    """Where a logger keeps the run; each uses some of these."""

    project: str | None = None
    """wandb: project."""
    run: str | None = None
    """wandb: name of the run; null: W&B makes one up."""
    group: str | None = None
    """wandb: group of the run."""
    teamspace: str | None = None
    """litlogger: teamspace where charts and artifacts appear."""
    metadata: dict | None = None
    """litlogger: tags of the run."""
    log_model: bool = False
    """litlogger: upload checkpoints."""
    save_logs: bool = True
    """litlogger: upload the terminal output."""
    checkpoint_name: str | None = None
    """litlogger: name of the checkpoints."""


@dataclass
class ScheduleArgs(Section, key="schedule"):
    """Learning rate schedule, from the optimizer's lr to train.min_lr."""

    name: ScheduleName = "cosine"
    """Shape after the warm-up (train.lr_warmup_steps); wsd is warm-up, stable, decay."""
    decay_fraction: Fraction = 0.2
    """wsd: final fraction of the training, over which the rate falls to train.min_lr."""


@dataclass
class ParameterGroupArgs(Section, key="parameter_groups"):
    """Parameters that the optimizer treats differently."""

    no_weight_decay: list[Literal["norms", "biases", "embeddings"]] = field(default_factory=list)
    """Kinds of parameters without weight decay; biases include attention sinks."""
    router_lr_factor: NonNegativeFloat = 1.0
    """Factor on the learning rate of the routers' gates."""


@dataclass
class AnomalyArgs(Section, key="anomaly"):
    """What to do when a step's gradient is not finite, or far larger than usual."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If the gradient norm is NaN or infinite: end the run before the weights change, or skip the step."""
    on_spike: Literal["stop", "skip"] = "skip"
    """If the gradient norm is a spike: end the run before the weights change, or skip the step."""
    spike_factor: AboveOne | None = None
    """A gradient norm above this multiple of the median of recent steps is a spike; null: none is."""
    window: PositiveInt = 64
    """Number of recent steps in the median; no step is a spike before there are as many."""
    max_consecutive: PositiveInt = 8
    """Number of consecutive skipped steps after which the run ends."""


@dataclass
class EmaArgs(Section, key="ema"):
    """Exponential moving average of the weights, saved inside each checkpoint as one of its own."""

    decay: Share | None = None
    """Share of the average that each step keeps, such as 0.999; null: no average."""
