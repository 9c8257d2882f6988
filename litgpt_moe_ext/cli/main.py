"""The entry point of `litgpt-moe`: a table of commands, each imported only when called."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from litgpt_moe_ext.cli.environment import prepare_environment
from litgpt_moe_ext.errors import SettingsError, did_you_mean, exit_status
from litgpt_moe_ext.garbage import collect_rarely
from litgpt_moe_ext.host.autoload import require_enabled
from litgpt_moe_ext.host.lazy_imports import data_modules
from litgpt_moe_ext.interruption import end_with_the_reader
from litgpt_moe_ext.meta import registrations


class Command(NamedTuple):
    """One line of `litgpt-moe --help`.

    Attributes:
        name: What the user types.
        place: Module and class of its arguments, whose method `run` does the work.
        summary: What it does, in one line.
        describes: Whether it only describes its input, without training or loading a model.
    """

    name: str
    place: str
    summary: str
    describes: bool = False


COMMANDS = (
    Command("init", "init:Init", "Write one of the packaged recipes, to be trained or changed."),
    Command(
        "doctor", "doctor:Doctor", "Say whether this machine can run a recipe, and what to change.", describes=True
    ),
    Command(
        "model-card", "model_card:ModelCard", "Print parameters, FLOPs per token and memory of a model.", describes=True
    ),
    Command(
        "twin",
        "studies.twin:Twin",
        "Write the dense twin of an MoE recipe at equal cost, or an MoE twin of a dense one.",
        describes=True,
    ),
    Command("study", "studies.study:Study", "Train a grid of settings over seeds, and say on one page what came out."),
    Command("schedule", "schedule:Schedule", "Plot the learning rate of a recipe over its steps.", describes=True),
    Command("compare-runs", "compare_runs:CompareRuns", "Draw training curves and expert load of several runs."),
    Command("experts", "experts:Experts", "Report what the experts of a checkpoint do with a text."),
    Command("perplexity", "perplexity:Perplexity", "Measure perplexity and bits per byte of a checkpoint on a text."),
    Command("hellaswag", "hellaswag:HellaSwag", "Score a checkpoint on HellaSwag from a local file."),
    Command("chat", "chat:Chat", "Continue what you type, coloured by expert if you like."),
    Command(
        "benchmark-generation",
        "benchmark_generation:BenchmarkGeneration",
        "Measure prefill and decode speed beside a dense twin and LLaMAMoE.",
    ),
    Command("tune", "tune:Tune", "Measure the fastest block sizes for the experts of a recipe on this GPU."),
    Command(
        "upcycle",
        "conversion.upcycle:Upcycle",
        "Turn a dense checkpoint into an MoE checkpoint that computes the same.",
    ),
    Command("import", "conversion.hugging_face:Import", "Write a Hugging Face checkpoint with this package's layers."),
    Command(
        "export", "conversion.hugging_face:Export", "Write a checkpoint for transformers and vLLM, exact or refused."
    ),
    Command(
        "convert-experts", "conversion.convert_experts:ConvertExperts", "Write a checkpoint with LitGPT's own LLaMAMoE."
    ),
)

_PROGRAM = "litgpt-moe"
# It has its own parser, because its settings are those of a recipe.
_TRAIN = ("train", "Train a recipe: `train --config FILE`, with the settings of recipes as flags.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status: 0 success, 1 the answer is no, 2 a setting or an input is wrong, 130 after Ctrl-C,
        143 after SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with collect_rarely():
        return exit_status(lambda: _run(given, own_process=arguments is None))


def load(command: Command) -> type:
    """Import a command and return its class."""
    module, _, name = command.place.partition(":")
    return getattr(importlib.import_module(f"litgpt_moe_ext.cli.commands.{module}"), name)


def _run(given: Sequence[str], own_process: bool) -> int | None:
    if not given or given[0] in ("-h", "--help", "help"):
        if own_process:
            end_with_the_reader()
        print(_overview())
        return 0
    if given[0] == "--version":
        from litgpt_moe_ext import __version__

        print(f"{_PROGRAM} {__version__}")
        return 0
    prepare_environment()
    if given[0] == _TRAIN[0]:
        from litgpt_moe_ext.cli.train import main as train

        if own_process and {"-h", "--help"} & set(given):
            end_with_the_reader()
        return train(given[1:])
    from litgpt_moe_ext.cli.arguments import read_arguments

    command = _find(given[0])
    if command.describes and own_process:
        # A caller from Python may use torch after the command, and need all of it.
        registrations.postpone()
        data_modules.postpone()
        end_with_the_reader()
    ready = read_arguments(load(command), f"{_PROGRAM} {command.name}", given[1:])
    require_enabled()
    return ready.run()


def _find(name: str) -> Command:
    by_name = {command.name: command for command in COMMANDS}
    if name not in by_name:
        known = [_TRAIN[0], *by_name]
        hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
        raise SettingsError(f"{name!r} is not a command of {_PROGRAM}{hint}")
    return by_name[name]


def _overview() -> str:
    width = max(len(command.name) for command in COMMANDS)
    summaries = [_TRAIN, *((command.name, command.summary) for command in COMMANDS)]
    lines = [f"  {name:<{width}}  {summary}" for name, summary in summaries]
    return "\n".join(
        (
            f"usage: {_PROGRAM} COMMAND ...",
            "",
            "Train Mixture-of-Experts models, judge recipes and checkpoints, look inside them, and convert them.",
            "",
            *lines,
            "",
            f"`{_PROGRAM} COMMAND --help` explains a command. Exit status: 0 success, 1 failure (or the answer "
            "is no), 2 a wrong setting.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
