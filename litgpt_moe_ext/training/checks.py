"""Checks before any long work starts. Each error names the setting, its value and what would be right."""

import os
import tempfile
from pathlib import Path
from typing import Any


def check_batch(global_batch_size: int, micro_batch_size: int, processes: int) -> None:
    """Raise ValueError unless the global batch can be made of whole micro batches on every process."""
    for name, value in (("global_batch_size", global_batch_size), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise ValueError(f"train.{name}: {value} must be at least 1")
    unit = micro_batch_size * processes
    if global_batch_size % unit:
        below, above = global_batch_size // unit * unit, -(-global_batch_size // unit) * unit
        nearest = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"train.global_batch_size: {global_batch_size} is not a multiple of train.micro_batch_size "
            f"({micro_batch_size}) times the number of processes ({processes}); the nearest that are: {nearest}"
        )


def check_at_least(name: str, value: float | None, low: float, hint: str = "") -> None:
    """Raise ValueError if a number that is set is less than `low`."""
    if value is not None and not value >= low:
        raise ValueError(f"{name}: {value} must be at least {low}{hint}")


def check_intervals(train: Any, eval: Any) -> None:
    """Raise ValueError unless LitGPT's loop can divide by its intervals.

    Args:
        train: `litgpt.args.TrainArgs`.
        eval: `litgpt.args.EvalArgs`.
    """
    never = "; null is never"
    check_at_least("train.save_interval", train.save_interval, 1, never)
    check_at_least("train.log_interval", train.log_interval, 1)
    check_at_least("train.lr_warmup_steps", train.lr_warmup_steps, 0)
    check_at_least("train.min_lr", train.min_lr, 0)
    check_at_least("train.max_steps", train.max_steps, 1)
    check_at_least("train.max_time", train.max_time, 0)
    if train.max_norm is not None and not train.max_norm > 0:
        raise ValueError(f"train.max_norm: {train.max_norm} must be above 0; null clips no gradient")
    check_at_least("eval.interval", eval.interval, 1, "; a number above that of the steps is never")
    check_at_least("eval.max_iters", eval.max_iters, 1)


def check_peak(peak_tflops: float | None) -> None:
    """Raise ValueError unless the peak of a device is positive."""
    if peak_tflops is not None and not peak_tflops > 0:
        raise ValueError(f"peak_tflops: {peak_tflops} must be above 0, or null")


def check_seed(seed: int) -> None:
    """Raise ValueError unless every library takes the seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed} must be from 0 to {2**32 - 1}")


def check_optimizer(optimizer: str | dict) -> float:
    """Return the learning rate of an optimizer, made for a parameter that is thrown away.

    Raises:
        ValueError: If it cannot be made.
    """
    import copy

    import torch
    from litgpt.utils import instantiate_torch_optimizer

    try:
        made = instantiate_torch_optimizer(copy.deepcopy(optimizer), [torch.nn.Parameter(torch.zeros(1))])
        return made.defaults["lr"]
    except (ImportError, AttributeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"optimizer: {optimizer!r} cannot be made: {error}. Give the name of a class in torch.optim, or its full "
            "path as class_path and its arguments as init_args."
        ) from error


def check_learning_rate(peak: float, floor: float, schedule: str) -> None:
    """Raise ValueError if a learning rate that is to fall would rise."""
    if schedule != "constant" and floor > peak:
        raise ValueError(
            f"train.min_lr: {floor} is above the optimizer's learning rate {peak}, from which it falls to there; set "
            "--optimizer.lr or --train.min_lr"
        )


def check_model_size(config: Any) -> None:
    """Raise ValueError unless a `litgpt.Config` has something of everything."""
    for name in ("n_layer", "n_embd", "n_head", "vocab_size"):
        check_at_least(f"model_config.{name}", getattr(config, name), 1)


def check_training_length(train: Any) -> None:
    """Raise ValueError unless `litgpt.args.TrainArgs` says in tokens how long to train."""
    if train.max_tokens is None:
        raise ValueError("train.max_tokens: null says not how long to train; give a number of tokens")
    if train.epochs is not None:
        raise ValueError(f"train.epochs: {train.epochs} has no meaning for pretraining; give train.max_tokens")


def check_processes(devices: int | str, num_nodes: int) -> None:
    """Raise ValueError unless the numbers of devices and nodes are numbers of something."""
    if devices != "auto" and not (isinstance(devices, int) and (devices >= 1 or devices == -1)):
        raise ValueError(f"devices: {devices!r} must be auto or at least 1")
    check_at_least("num_nodes", num_nodes, 1)


def check_length(max_seq_length: int | None, block_size: int) -> None:
    """Raise ValueError unless the training length is one the model has positions for."""
    check_at_least("model_config.block_size", block_size, 1)
    if max_seq_length is not None and not 1 <= max_seq_length <= block_size:
        raise ValueError(
            f"train.max_seq_length: {max_seq_length} must be from 1 to the model's block_size: {block_size}"
        )


def check_writable(out_dir: Path) -> None:
    """Raise an error unless `out_dir` can be a directory of the run's own; creates it."""
    if out_dir.resolve() == Path.cwd():
        raise ValueError(f"out_dir: {str(out_dir)!r} is the working directory; name one for this run alone")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out_dir, prefix=".write-test-"):
            pass
    except OSError as error:
        raise PermissionError(
            f"out_dir: {str(out_dir)!r} cannot be written to ({error.strerror or error}); choose another --out_dir"
        ) from error


def open_tokenizer(tokenizer_dir: Path, padded_vocab_size: int) -> Any:
    """Return the `litgpt.Tokenizer` of a directory, checked by `check_tokenizer`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be opened, or does not suit the model.
    """
    from litgpt.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer(tokenizer_dir)
    except NotImplementedError as error:  # how LitGPT says that it found neither file
        raise FileNotFoundError(
            f"tokenizer_dir: {str(tokenizer_dir)!r} has neither tokenizer.json nor tokenizer.model"
        ) from error
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise ValueError(f"tokenizer_dir: {str(tokenizer_dir)!r} cannot be opened: {error}") from error
    check_tokenizer(tokenizer, tokenizer_dir, padded_vocab_size)
    return tokenizer


def check_tokenizer(tokenizer: Any, tokenizer_dir: Path, padded_vocab_size: int) -> None:
    """Raise ValueError unless a `litgpt.Tokenizer` separates documents and fits into the model's vocabulary."""
    if tokenizer.eos_id is None:
        raise ValueError(
            f"tokenizer_dir: {str(tokenizer_dir)!r} has no end-of-text token: documents could not be told apart, and "
            'generation would not stop. Add "eos_token" to its tokenizer_config.json.'
        )
    if tokenizer.backend == "huggingface":
        size = tokenizer.processor.get_vocab_size(with_added_tokens=True)
    else:
        size = tokenizer.vocab_size
    if size > padded_vocab_size:
        raise ValueError(
            f"tokenizer_dir: {str(tokenizer_dir)!r} has {size} tokens, more than the model's padded_vocab_size: "
            f"{padded_vocab_size}; set model_config.padded_vocab_size to at least {size}"
        )


def check_checkpoint_dir(name: str, directory: Path) -> None:
    """Raise FileNotFoundError unless `directory`, the value of setting `name`, holds a LitGPT model."""
    if not (directory / "lit_model.pth").is_file():
        where = "does not exist" if not os.path.isdir(directory) else "has no lit_model.pth"
        raise FileNotFoundError(f"{name}: {str(directory)!r} {where}")
