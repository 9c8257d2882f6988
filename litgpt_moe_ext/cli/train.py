"""The command line of `run_train.py`: LitGPT's `pretrain` arguments, YAML files, and a few short forms.

The command line beats the YAML file, which beats the defaults, in whatever order they stand.
"""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

from litgpt_moe_ext.cli.parser_errors import annotation_in, near_name, plain_error, value_in
from litgpt_moe_ext.cli.recipe_files import check_recipe, place_of

SHORT_FORMS = {
    "--micro-batch-size": "--train.micro_batch_size",
    "--global-batch-size": "--train.global_batch_size",
    "--max-seq-length": "--train.max_seq_length",
    "--wandb-dataset": "--wandb_dataset",
    "--wandb-artifacts-dir": "--wandb_artifacts_dir",
}

USAGE = "run_train.py [--config FILE] [--resume auto|true|PATH] [--KEY VALUE ...]"

EPILOG = (
    "Short forms: "
    + ", ".join(f"{short} for {full}" for short, full in SHORT_FORMS.items())
    + "; --progress and --no-progress for --progress true and false. Every key may also stand in the YAML file. "
    "Ctrl-C, SIGTERM and SIGUSR1 finish the step, save, and end with exit status 130, 143 and 138; with SLURM, "
    "#SBATCH --signal=SIGUSR1@300 does so five minutes before the time limit. Exit status 1: training cannot go on, "
    "2: a setting is wrong."
)


def normalize(arguments: Sequence[str], default_config: Path) -> list[str]:
    """Expand short forms and put `--config` first, so that the other arguments override it.

    Args:
        arguments: As given by the user, without the program's name.
        default_config: Recipe to use if none is named.
    """
    configs: list[str] = []
    others: list[str] = []
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name == "--config":
            if not equals and not waiting:
                raise SystemExit("error: --config needs the path of a YAML file")
            configs += ["--config", value if equals else waiting.pop(0)]
        elif name in ("--no-progress", "--progress") and not equals:
            given = name == "--progress" and waiting and waiting[0] in ("true", "false", "null")
            others.append(f"--progress={waiting.pop(0) if given else str(name == '--progress').lower()}")
        else:
            others.append(SHORT_FORMS.get(name, name) + equals + value)
    return (configs or ["--config", str(default_config)]) + others


def take_optimizer_keys(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Split `--optimizer VALUE` and `--optimizer.init_args.KEY VALUE` (or `--optimizer.KEY VALUE`) off the others.

    The optimizer may be a name or a dictionary. jsonargparse puts a key of it at a level where nothing reads it, and
    cannot replace a dictionary by another.

    Returns:
        The other arguments, and the values by key: the name of an argument of the optimizer, `class_path`, or the empty
        string for the whole.
    """
    others: list[str] = []
    keys: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        key = name.removeprefix("--optimizer").removeprefix(".").removeprefix("init_args.")
        if not (name == "--optimizer" or name.startswith("--optimizer.")) or key == "init_args":
            others.append(name + equals + value)
        elif not equals and not waiting:
            raise SystemExit(f"error: {name} needs a value")
        else:
            keys[key] = value if equals else waiting.pop(0)
    return others, keys


def with_optimizer_keys(optimizer: str | dict, keys: dict[str, str]) -> dict:
    """Return an optimizer, as `class_path` and `init_args`, with some keys replaced.

    Args:
        optimizer: As in a recipe: a name, or a dictionary of `class_path` and `init_args`.
        keys: As from `take_optimizer_keys`; the values are YAML.
    """
    import yaml

    new = {name: yaml.safe_load(value) for name, value in keys.items()}
    optimizer = new.pop("", optimizer)
    if not isinstance(optimizer, (str, dict)) or "class_path" not in optimizer and not isinstance(optimizer, str):
        raise ValueError(f"optimizer: {optimizer!r} must be a name, or class_path and init_args")
    if isinstance(optimizer, str):
        optimizer = {"class_path": optimizer if "." in optimizer else f"torch.optim.{optimizer}"}
    class_path = new.pop("class_path", optimizer["class_path"])
    return {"class_path": class_path, "init_args": {**optimizer.get("init_args", {}), **new}}


def take_nulls(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split `--model_config.FIELD null` off the others; jsonargparse reads it as the text None.

    Returns:
        The other arguments, and the names of the fields.
    """
    others: list[str] = []
    nulls: list[str] = []
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name.startswith("--model_config.") and (value if equals else (waiting or [""])[0]) in ("null", "~"):
            nulls.append(name.removeprefix("--model_config."))
            del waiting[: not equals]
        else:
            others.append(name + equals + value)
    return others, nulls


def build_parser():
    """Return the jsonargparse parser of `entry.setup`."""
    import jsonargparse
    from jsonargparse import set_docstring_parse_options
    from litgpt.config import Config

    from litgpt_moe_ext.training.entry import setup

    set_docstring_parse_options(attribute_docstrings=True)

    annotations = get_type_hints(setup)

    class ArgumentParser(jsonargparse.ArgumentParser):
        # The outermost parser explains; jsonargparse makes others of this class for parts of the settings.
        given: list[str] | None = None
        place_of = staticmethod(lambda message: "")

        def error(self, message: str, *args, **kwargs):
            if self.given is not None:
                known = [action.dest for action in self._actions] + [f"model_config.{f.name}" for f in fields(Config)]
                annotation_of, value_of = partial(annotation_in, annotations), partial(value_in, self.given)
                plain = plain_error(message, annotation_of, value_of)
                message = plain + near_name(message, known) + self.place_of(plain)
            super().error(message, *args, **kwargs)

        def parse_args(self, args=None, *others, **kwargs):
            if self is parser:
                self.given = list(args or [])
            return super().parse_args(args, *others, **kwargs)

    parser = ArgumentParser(prog="run_train.py", usage=USAGE, description=setup.__doc__.splitlines()[0], epilog=EPILOG)
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below.")
    parser.add_function_arguments(setup, as_group=False, fail_untyped=False)
    return parser


def main(arguments: Sequence[str] | None = None, default_config: Path = Path("configs/quickstart.yaml")) -> int:
    """Run training from the command line.

    Args:
        arguments: The command line without the program's name; None takes it from `sys.argv`.
        default_config: Recipe to use if none is named.

    Returns:
        The exit status: 0 after training, 1 if it cannot go on, 2 for a wrong setting, 128 plus the number of the
        signal that ended the run: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1 (Linux).
    """
    arguments = normalize(sys.argv[1:] if arguments is None else arguments, default_config)
    if "--help" in arguments or "-h" in arguments:
        from litgpt_moe_ext.cli.quick_help import print_help

        print_help()
        return 0
    _prepare_environment()
    parser = build_parser()
    given = arguments
    arguments, optimizer_keys = take_optimizer_keys(arguments)
    arguments, nulls = take_nulls(arguments)
    recipes = [Path(value) for name, value in pairwise(arguments) if name == "--config"]
    try:
        for file in recipes:
            check_recipe(file)
    except ValueError as error:
        parser.error(str(error))
    parser.place_of = partial(place_of, files=recipes, arguments=given)
    # jsonargparse would print the configuration before the optimizer's keys are in it.
    print_only = "--print_config" in arguments and (optimizer_keys or nulls)
    parsed = parser.parse_args([a for a in arguments if not (print_only and a == "--print_config")])
    _set_null(parser, parsed, nulls)
    if optimizer_keys:
        try:
            parsed.optimizer = with_optimizer_keys(parsed.optimizer, optimizer_keys)
        except ValueError as error:
            parser.error(str(error))
    if print_only:
        print(parser.dump(parsed, skip_none=False), end="")
        return 0
    try:
        values = parser.instantiate_classes(parsed).as_dict()
    except (ValueError, AssertionError) as error:
        parser.error(str(error))
    values.pop("config", None)
    return _train(values, parser.place_of)


def _set_null(parser: Any, parsed: Any, names: Iterable[str]) -> None:
    from litgpt.config import Config

    types = {field.name: field.type for field in fields(Config)}
    for name in names:
        if name not in types:
            parser.error(f"Unrecognized arguments: --model_config.{name}")
        if type(None) not in get_args(types[name]):
            parser.error(f"model_config.{name}: null is no value for it; leave it out for its default")
        if parsed.model_config is None:
            parser.error(f"model_config.{name}: null, but there is no model_config to set it in")
        parsed.model_config[name] = None


def _prepare_environment() -> None:
    # litdata, which LitGPT imports, otherwise asks the package index for its newest version and waits if it is offline.
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    # OpenMP's threads wait for each other by spinning, for milliseconds. As soon as another program wants one of the
    # cores, the spinning keeps the thread that is waited for from running: training on a CPU becomes ten times slower
    # where twice would be fair (benchmarks/openmp_spin.py). A short spin costs a few percent on an idle machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _train(values: dict, place_of: Callable[[str], str]) -> int:
    from litgpt_moe_ext.errors import SettingsError
    from litgpt_moe_ext.training.control import TrainingInterrupted, TrainingStopped
    from litgpt_moe_ext.training.entry import setup

    try:
        setup(**values)
    except SettingsError as error:
        print(f"error: {error}{place_of(str(error))}", file=sys.stderr)
        return 2
    except TrainingStopped as reason:
        return _stopped(f"Stopped: {reason}", 1)
    except TrainingInterrupted as interruption:
        if interruption.checkpoint is None:
            outcome = " before the first step was finished: there is nothing to continue from."
        else:
            outcome = f", saved as {interruption.checkpoint}; --resume auto continues."
        return _stopped(f"Stopped by {interruption}{outcome}", 128 + interruption.signal_number)
    except KeyboardInterrupt:
        print("Stopped at once; --resume auto continues from the last checkpoint, if there is one.", file=sys.stderr)
        return 130
    return 0


def _stopped(message: str, status: int) -> int:
    from litgpt_moe_ext.training.parallel.lost_processes import started_by_fabric

    # All processes stop for the same reason. The first one reports it, and is to end by itself: Fabric kills it as soon
    # as one that it started ends with an error.
    if started_by_fabric():
        return 0
    print(message, file=sys.stderr)
    return status
