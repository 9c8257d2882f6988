"""The entry point of training: LitGPT's `pretrain`, with hooks.

The module imports only what the argument parser needs; torch and LitGPT's machinery come in when training starts.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.types import LoggerChoice

import litgpt_moe_ext
import litgpt_moe_ext.data
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.checks import (
    check_batch,
    check_checkpoint_dir,
    check_intervals,
    check_learning_rate,
    check_length,
    check_model_size,
    check_optimizer,
    check_peak,
    check_processes,
    check_seed,
    check_training_length,
    check_writable,
)
from litgpt_moe_ext.training.parallel.combinations import check_combination
from litgpt_moe_ext.training.settings import (
    AnomalyArgs,
    CheckpointArgs,
    DistributedArgs,
    EmaArgs,
    EvaluateArgs,
    ParameterGroupArgs,
    SampleArgs,
    ScheduleArgs,
    StrategyName,
)


def setup(
    model_name: str = "",
    model_config: Config | None = None,
    out_dir: Path = Path("out/pretrain"),
    precision: Literal["bf16-true", "bf16-mixed", "16-mixed", "32-true"] | None = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(  # noqa: B008
        save_interval=1000,
        log_interval=1,
        global_batch_size=512,
        micro_batch_size=4,
        max_tokens=int(3e12),
        max_norm=1.0,
        min_lr=4e-5,
        lr_warmup_steps=2000,
        tie_embeddings=False,
    ),
    eval: EvalArgs = EvalArgs(interval=1000, max_iters=100),  # noqa: B008
    log: LogArgs = LogArgs(),  # noqa: B008
    optimizer: str | dict = "AdamW",
    devices: int | str = "auto",
    num_nodes: int = 1,
    tokenizer_dir: Path | None = None,
    logger_name: LoggerChoice = "csv",
    seed: int = 42,
    strategy: StrategyName = "auto",
    compile: bool | Literal["auto"] = "auto",
    float32_matmul_precision: Literal["highest", "high", "medium"] | None = None,
    activation_checkpointing: Literal["none", "full", "selective"] = "none",
    fused_cross_entropy: bool = False,
    progress: bool | None = None,
    peak_tflops: float | None = None,
    sample: SampleArgs = SampleArgs(),  # noqa: B008
    evaluate: EvaluateArgs = EvaluateArgs(),  # noqa: B008
    wandb_dataset: str | None = None,
    wandb_artifacts_dir: Path | None = None,
    schedule: ScheduleArgs = ScheduleArgs(),  # noqa: B008
    parameter_groups: ParameterGroupArgs = ParameterGroupArgs(),  # noqa: B008
    anomaly: AnomalyArgs = AnomalyArgs(),  # noqa: B008
    ema: EmaArgs = EmaArgs(),  # noqa: B008
    checkpoint: CheckpointArgs = CheckpointArgs(),  # noqa: B008
    distributed: DistributedArgs = DistributedArgs(),  # noqa: B008
) -> None:
    """Pretrain a model with LitGPT.

    Args:
        model_name: Name of one of LitGPT's models, used if `model_config` is not given.
        model_config: The architecture, as a `litgpt.Config`; see configs/ for examples.
        out_dir: Directory for checkpoints and logs.
        precision: Number format. Default: bf16-mixed on a GPU that has it, 16-mixed on another GPU, 32-true on a CPU.
        initial_checkpoint_dir: Checkpoint directory whose weights to start from. Excludes `resume`.
        resume: `auto` continues from the newest whole checkpoint in `out_dir` if there is one, `true` insists on one, a
            path names one.
        data: The data module, as `class_path` and `init_args`. Default: `litgpt.data.TinyLlama`.
        train: Training arguments.
        eval: Validation arguments.
        log: Logger arguments.
        optimizer: Name of a torch optimizer, or `class_path` and `init_args` of any.
        devices: Devices per node, or auto for all GPUs.
        num_nodes: Number of nodes.
        tokenizer_dir: Directory of the tokenizer. Data modules that make their own need none.
        logger_name: Where metrics go.
        seed: Seed of the random generators.
        strategy: How processes share the work; auto is ddp wherever there are several. DeepSpeed's need CUDA devices
            and `uv sync --extra deepspeed`.
        compile: Whether to use `torch.compile`; auto does where it works and pays, and says so.
        float32_matmul_precision: As `torch.set_float32_matmul_precision`: high and medium let GPUs use TF32 or bf16 for
            float32 products; medium makes CPUs use oneDNN, which is faster. Default: torch's.
        activation_checkpointing: Compute activations again in the backward pass: all of a block, or selectively.
        fused_cross_entropy: Compute output head and loss together, without keeping the logits.
        progress: Draw a progress bar. Default: if the output is a terminal.
        peak_tflops: What a device computes at best, in TFLOP/s, without sparsity: with it the log has the utilization
            (mfu). Default: known for many GPUs, for CPUs not.
        sample: Text to write after every validation.
        evaluate: Benchmarks to run while training.
        wandb_dataset: Train on a prepared corpus from W&B, entity/project/name:alias, instead of that of `data`.
        wandb_artifacts_dir: Where to keep it. Default: data/wandb.
        schedule: Shape of the learning rate.
        parameter_groups: Weight decay and learning rate of particular parameters.
        anomaly: What to do about gradients that are not finite or unusually large.
        ema: Moving average of the weights.
        checkpoint: Which checkpoints to keep.
        distributed: Knobs of the strategy.

    Raises:
        SettingsError: If a setting or an input is wrong; before any training, with the setting, its value and a remedy.
    """
    arguments = dict(locals())
    with _as_settings_errors():
        litgpt_moe_ext.register()
        from litgpt_moe_ext.training.checkpoint.hyperparameters import to_plain

        settings = {name: to_plain(value) for name, value in arguments.items() if value is not None}
        config = _resolve_config(model_name, model_config)
        check_model_size(config)
        check_length(train.max_seq_length, config.block_size)
        check_training_length(train)
        check_processes(devices, num_nodes)
        check_intervals(train, eval)
        check_seed(seed)
        check_learning_rate(check_optimizer(optimizer), train.min_lr, schedule.name)
        check_peak(peak_tflops)
        check_combination(SimpleNamespace(**arguments))
        if tokenizer_dir is not None and not Path(tokenizer_dir).is_dir():
            raise FileNotFoundError(f"tokenizer_dir: {str(tokenizer_dir)!r} is no directory; it must hold a tokenizer")
        if wandb_dataset is not None:
            data = litgpt_moe_ext.data.WandbCorpus.instead_of(data, wandb_dataset, wandb_artifacts_dir)
        out_dir = Path(out_dir)
        check_writable(out_dir)
        if evaluate.wanted:
            from litgpt_moe_ext.training.callbacks.benchmarks import check_benchmarks

            check_benchmarks(evaluate)
        if initial_checkpoint_dir is not None:
            check_checkpoint_dir("initial_checkpoint_dir", initial_checkpoint_dir)

    from litgpt_moe_ext.training.run import Run

    run = Run(config=config, train=train, out_dir=out_dir, settings=settings, progress=progress)
    with run.closing():
        with _as_settings_errors():
            run.set_matmul_precision(float32_matmul_precision)
            run.launch(devices, num_nodes, strategy, precision, logger_name, log, distributed)
            check_batch(train.global_batch_size, train.micro_batch_size, run.fabric.world_size)
            run.add_telemetry(peak_tflops)
            run.require_whole_model(evaluate)
            run.lock_out_dir()
            run.find_checkpoint(resume, initial_checkpoint_dir, eval)
            run.prepare_data(data, tokenizer_dir)
            run.add_samples(sample)
            run.add_benchmarks(evaluate)
            run.add_memory_savers(activation_checkpointing, fused_cross_entropy)
            run.add_optimization(schedule, parameter_groups, anomaly, ema)
        run.train(seed, initial_checkpoint_dir, eval, optimizer, compile, checkpoint)


@contextlib.contextmanager
def _as_settings_errors() -> Iterator[None]:
    # Everything before the first step that fails for its values fails for what the user gave.
    try:
        yield
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        raise SettingsError(str(error)) from error


def _resolve_config(model_name: str, model_config: Config | None) -> Config:
    if model_config is not None:
        return model_config
    if not model_name:
        raise ValueError(
            "model_config: None: give a model_config (see configs/) or the model_name of one of LitGPT's models"
        )
    try:
        return Config.from_name(model_name)
    except ValueError as error:
        raise ValueError(
            f"model_name: {model_name!r} is none of LitGPT's; `litgpt pretrain list` prints them"
        ) from error
