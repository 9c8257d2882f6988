"""The whole tree of settings."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from litgpt_moe_ext.field_types import PositiveFloat, PositiveInt, Seed
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.settings.distributed import DistributedArgs, StrategyName
from litgpt_moe_ext.training.settings.loop import (
    AnomalyArgs,
    EmaArgs,
    EvalArgs,
    LogArgs,
    ParameterGroupArgs,
    ScheduleArgs,
    TrainArgs,
)
from litgpt_moe_ext.training.settings.outputs import CheckpointArgs, EvaluateArgs, SampleArgs
from litgpt_moe_ext.training.settings.section import Section
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.data import DataModule


@dataclass
class Settings(Section):
    """All settings of a run: those of `litgpt pretrain` and a few more."""

    model_name: str = ""
    """Name of a LitGPT model, used if model_config is not given."""
    model_config: "Config | None" = None
    """The architecture, as a litgpt.Config; see configs/ for examples."""
    out_dir: Path = Path("out/pretrain")
    """Directory for checkpoints and logs."""
    precision: Literal["bf16-true", "bf16-mixed", "16-mixed", "32-true"] | None = None
    """Number format; null: bf16-mixed on GPUs that support it, 16-mixed on other GPUs, 32-true on a CPU."""
    initial_checkpoint_dir: Path | None = None
    """Checkpoint directory to take initial weights from; with resume: auto, only if there is nothing to resume."""
    resume: bool | Literal["auto"] | Path = False
    """auto: continue from the newest whole checkpoint in out_dir, if any; true: require one; a path: that checkpoint,
    or the newest one of that run."""
    data: "DataModule | None" = None
    """Data module, by name, or class_path and init_args; null: litgpt.data.TinyLlama."""
    train: TrainArgs = field(default_factory=TrainArgs)
    """Batches, length and limits of the training."""
    eval: EvalArgs = field(default_factory=EvalArgs)
    """Validation."""
    log: LogArgs = field(default_factory=LogArgs)
    """Options of the loggers."""
    optimizer: str | dict = "AdamW"
    """Name of a torch optimizer, or class_path and init_args of any optimizer."""
    devices: Literal["auto"] | int = "auto"
    """Devices per node; auto or -1: all GPUs, or one CPU."""
    num_nodes: PositiveInt = 1
    """Number of nodes."""
    tokenizer_dir: Path | None = None
    """Directory of the tokenizer; not needed by data modules that make their own."""
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = "csv"
    """Where metrics go."""
    seed: Seed = 42
    """Seed of the random generators."""
    strategy: StrategyName = "auto"
    """How processes share the work; auto: ddp if there are several. DeepSpeed needs CUDA and the extra deepspeed."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to use torch.compile; auto: where it works and pays off, as the log says."""
    cuda_graphs: bool | Literal["auto"] = "auto"
    """Whether to run passes, validations, clipping and optimizer as CUDA graphs, which saves launch time; auto: on one
    GPU, if they work and fit in memory; true: insist, also under ddp, which then reduces gradients after the backward
    pass."""
    float32_matmul_precision: Literal["highest", "high", "medium"] | None = None
    """As in torch.set_float32_matmul_precision: high and medium let GPUs use TF32 or bf16 for float32 products, medium
    lets CPUs use oneDNN; null: torch's default."""
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    """Recompute activations in the backward pass; full: of whole blocks; selective: of experts and MLPs."""
    fused_cross_entropy: bool = False
    """Compute the output head and the loss together, without storing the logits."""
    progress: bool | None = None
    """Draw a progress bar in a terminal; files, always including train.log, get a line per log interval."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of a device, without sparsity, for the utilization (mfu) in the log; null: known for many GPUs."""
    sample: SampleArgs = field(default_factory=SampleArgs)
    """Text that the model writes after every validation."""
    evaluate: EvaluateArgs = field(default_factory=EvaluateArgs)
    """Benchmarks to run while training."""
    wandb_dataset: str | None = None
    """Train on a prepared corpus from W&B, entity/project/name:alias, instead of the corpus of data."""
    wandb_artifacts_dir: Path | None = None
    """Directory for the corpus of wandb_dataset; null: data/wandb."""
    schedule: ScheduleArgs = field(default_factory=ScheduleArgs)
    """Learning rate schedule."""
    parameter_groups: ParameterGroupArgs = field(default_factory=ParameterGroupArgs)
    """Parameters that the optimizer treats differently."""
    anomaly: AnomalyArgs = field(default_factory=AnomalyArgs)
    """What to do about gradients that are not finite or unusually large."""
    ema: EmaArgs = field(default_factory=EmaArgs)
    """Moving average of the weights."""
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    """Which checkpoints to keep."""
    distributed: DistributedArgs = field(default_factory=DistributedArgs)
    """Options of the strategy."""
    callbacks: list[Callback] = field(default_factory=list)
    """Your own callbacks, each by class_path and init_args; see examples/add_a_callback.py."""

    def problems(self) -> Iterator[str]:
        """See `Section.problems`."""
        if self.devices != "auto" and self.devices < 1 and self.devices != -1:
            yield f"devices: {self.devices} must be auto, -1 or an integer of at least 1"
        if self.initial_checkpoint_dir is not None and self.resume not in (False, "auto"):
            yield (
                f"resume: {quoted(self.resume)} must be auto or false beside initial_checkpoint_dir: "
                f"{quoted(self.initial_checkpoint_dir)}"
            )
