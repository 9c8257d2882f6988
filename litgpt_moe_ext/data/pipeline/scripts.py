"""What the scripts of `data_prep/` share: their command line, errors in one line, and logging to W&B."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from litgpt_moe_ext.data.pipeline.corpus import TOKENIZER_DIR
from litgpt_moe_ext.data.pipeline.wandb_artifacts import check_artifact_name, log_corpus


def run_script(main: Callable[..., None], arguments: Sequence[str] | None = None) -> None:
    """Runs a script: parses the command line and turns wrong settings into one line.

    Options may be written with `-` or `_`; `--log-to-wandb` needs no value.

    Args:
        main: Its parameters are the options.
        arguments: The command line without the program's name; None takes it from `sys.argv`.
    """
    from jsonargparse import auto_cli

    given = [_normalize(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    try:
        auto_cli(main, as_positional=False, args=given)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print("Stopped; the same command continues.", file=sys.stderr)
        raise SystemExit(130) from None


def prepare(
    build: Callable[[], Path],
    log_to_wandb: bool = False,
    wandb_artifact: str | None = None,
    wandb_project: str | None = None,
) -> None:
    """Prepares a corpus, says where its tokenizer is, and logs it if asked to.

    Args:
        build: Prepares and returns the folder.
        log_to_wandb: Whether to log the corpus as a W&B artifact.
        wandb_artifact: Name of the artifact.
        wandb_project: W&B project of the artifact.
    """
    if log_to_wandb:
        check_artifact_name(wandb_artifact)
    elif wandb_artifact is not None:
        raise ValueError(f"wandb_artifact={wandb_artifact!r} has no effect without --log-to-wandb.")
    directory = build()
    if log_to_wandb:
        print(log_corpus(directory, wandb_artifact, wandb_project), flush=True)
    print(f"tokenizer_dir for LitGPT: {directory / TOKENIZER_DIR}", flush=True)


def _normalize(argument: str) -> str:
    if argument == "--log-to-wandb":
        return "--log_to_wandb=true"
    name, equals, value = argument.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else argument
