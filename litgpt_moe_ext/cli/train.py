"""The command line of `run_train.py`: LitGPT's `pretrain` settings, YAML files, and a few short forms.

Nothing heavy is imported before Ctrl-C is answered in one line.
"""

import contextlib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.cli.environment import prepare_environment
from litgpt_moe_ext.cli.recipes import recipes_dir
from litgpt_moe_ext.errors import CANNOT, SettingsError, exit_status
from litgpt_moe_ext.garbage import collect_rarely
from litgpt_moe_ext.interruption import end_with_the_reader

if TYPE_CHECKING:
    from litgpt_moe_ext.training.settings import Settings


def print_help() -> None:
    """Print the help of `run_train.py`, without loading torch or LitGPT unless an installed extension does."""
    from litgpt_moe_ext.cli.settings import build_parser
    from litgpt_moe_ext.config.fields import FIELDS
    from litgpt_moe_ext.extend import load_extensions
    from litgpt_moe_ext.host.autoload import disabled

    if not disabled():
        load_extensions()

    parser = build_parser({"model_config": dict, "data": dict})
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of these settings.")
    parser.add_argument(
        "--dense_twin",
        metavar="{flops,parameters}",
        help="Train the dense twin of an MoE recipe, of equal training FLOPs or active parameters per token; its "
        "out_dir ends in -dense. `litgpt-moe twin` writes the same as a recipe.",
    )
    parser.print_help()
    print("\nFields of model_config that this package adds or reads, beside those of litgpt.Config:")
    for name, field in FIELDS.items():
        doc = textwrap.fill(" ".join(field.doc.split()).replace("`", ""), 94)
        print(f"  --model_config.{name}\n{textwrap.indent(doc, ' ' * 6)}")


def main(arguments: Sequence[str] | None = None, default_config: Path | None = None) -> int:
    """Run training from the command line.

    Args:
        arguments: The command line without the program's name; None takes it from `sys.argv`.
        default_config: Recipe to use if none is named; None takes the packaged quickstart.

    Returns:
        The exit status: 0 after training, 1 if it cannot continue, 2 for a wrong setting, 128 plus the number of the
        signal that ended the run: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1 (Linux), 129 SIGHUP. Any other failure is a
        bug in this package or in code that a recipe names, and keeps its traceback.
    """
    own_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--help" in arguments or "-h" in arguments:
        if own_process:
            end_with_the_reader()
        print_help()
        return 0
    _shorten_spins()
    with collect_rarely():
        return exit_status(
            lambda: _run(arguments, default_config or recipes_dir() / "quickstart.yaml"),
            interrupted="Stopped at once; --resume auto continues from the last checkpoint, if there is one.",
        )


def _run(arguments: list[str], default_config: Path) -> int:
    prepare_environment()
    from litgpt_moe_ext.cli.settings import build_parser, litgpt_types, make_settings, parse, read_given

    types = litgpt_types()
    if helps := [index for index, name in enumerate(arguments) if name.partition("=")[0].endswith(".help")]:
        _help_of_class(build_parser(types), arguments[helps[0] : helps[0] + 2])
        return 0
    printed = [a.partition("=")[2] for a in arguments if a.partition("=")[0] == "--print_config"]
    if unknown := set(printed) - {"", "skip_null"}:
        raise SettingsError(f"--print_config: {min(unknown)!r} must be skip_null, or nothing")
    arguments = [a for a in arguments if a.partition("=")[0] != "--print_config"]
    given = read_given(arguments, default_config, types)
    with given.naming_places():
        parser, parsed = parse(given, types)
        if printed:
            print(parser.dump(parsed, skip_none="skip_null" in printed), end="")
            return 0
        return _train(make_settings(parser, parsed))


def _help_of_class(parser: Any, arguments: list[str]) -> None:
    # `--data.help CLASS`, which may be named alone as in `data`.
    import jsonargparse

    from litgpt_moe_ext import data

    name, equals, given = arguments[0].partition("=")
    given = given if equals else "".join(arguments[1:])
    if name != "--data.help":
        raise SettingsError(f"{name}: no class has settings here; --data.help CLASS shows those of a data module")
    if not given:
        raise SettingsError(f"--data.help: needs a class, --data.help CLASS: {', '.join(data.MODULES)}")
    try:
        parser.parse_args([f"{name}={data.import_path(given)}"])
    except SystemExit:  # after printing
        return
    except jsonargparse.ArgumentError as error:
        raise SettingsError(
            f"--data.help: {given} must be the import path of a class, or one of {', '.join(data.MODULES)}"
        ) from error


def _shorten_spins() -> None:
    # OpenMP's threads wait for each other by spinning for milliseconds. Once another program uses one of the cores, the
    # spinning starves the thread being waited for: CPU training becomes ten times slower instead of two
    # (benchmarks/openmp_spin.py). A short spin costs a few percent on an idle machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def _train(settings: "Settings") -> int:
    from litgpt_moe_ext.training.control import TrainingInterrupted, TrainingStopped
    from litgpt_moe_ext.training.run import run

    try:
        run(settings)
    except TrainingStopped as reason:
        return _stopped(f"Stopped: {reason}", CANNOT)
    except TrainingInterrupted as interruption:
        if interruption.checkpoint is None:
            outcome = " before the first step was finished: there is nothing to continue from."
        else:
            outcome = f", saved as {interruption.checkpoint}; --resume auto continues."
        return _stopped(f"Stopped by {interruption}{outcome}", 128 + interruption.signal_number)
    return 0


def _stopped(message: str, status: int) -> int:
    from litgpt_moe_ext.data.modules.base import is_first_rank
    from litgpt_moe_ext.training.parallel.processes import started_by_fabric

    # All processes have agreed to stop, which the first reports. One that is stopped at once (`exit_status`) cannot
    # know whether the others are, and speaks for itself.
    if is_first_rank():
        with contextlib.suppress(OSError):  # a terminal that is gone
            print(message, file=sys.stderr, flush=True)
    # Fabric would kill the first process if one that it has started ended with an error.
    return 0 if started_by_fabric() else status


if __name__ == "__main__":
    sys.exit(main())
