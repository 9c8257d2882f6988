"""The entry point of `litgpt-moe`: finds the sub-command, reads its arguments, reports errors in one line."""

import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_type_hints

# Name of each sub-command, and the function that is it.
COMMANDS = {
    "model-card": "litgpt_moe_ext.cli.commands.model_card:model_card",
    "experts": "litgpt_moe_ext.cli.commands.experts:experts",
    "perplexity": "litgpt_moe_ext.cli.commands.perplexity:perplexity",
    "hellaswag": "litgpt_moe_ext.cli.commands.hellaswag:hellaswag",
    "schedule": "litgpt_moe_ext.cli.commands.schedule:schedule",
    "compare-runs": "litgpt_moe_ext.cli.commands.compare_runs:compare_runs",
    "upcycle": "litgpt_moe_ext.cli.commands.upcycle:upcycle",
    "convert-experts": "litgpt_moe_ext.cli.commands.convert_experts:convert_experts",
    "benchmark-generation": "litgpt_moe_ext.cli.commands.benchmark_generation:benchmark_generation",
    "doctor": "litgpt_moe_ext.cli.commands.doctor:doctor",
    "chat": "litgpt_moe_ext.cli.commands.chat:chat",
}


def build_parser(given: Sequence[str] = ()):
    """Return the jsonargparse parser with all sub-commands.

    Args:
        given: The command line, for messages about what is wrong in it.
    """
    import jsonargparse

    from litgpt_moe_ext.cli.parser_errors import annotation_in, plain_error, value_in

    class ArgumentParser(jsonargparse.ArgumentParser):
        annotations: Mapping[str, Any] = {}

        def error(self, message: str, *args, **kwargs):
            annotation_of, value_of = partial(annotation_in, self.annotations), partial(value_in, list(given))
            super().error(plain_error(message, annotation_of, value_of), *args, **kwargs)

    parser = ArgumentParser(
        prog="litgpt-moe",
        description="Judge Mixture-of-Experts checkpoints, look inside them, and convert them.",
        epilog="`litgpt-moe COMMAND --help` explains the settings of a command.",
    )
    subcommands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        function = _function(name)
        summary = function.__doc__.splitlines()[0]
        subparser = ArgumentParser(description=summary)
        subparser.annotations = get_type_hints(function)
        subparser.add_function_arguments(function, as_group=False, as_positional=True)
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def normalize(arguments: Sequence[str]) -> list[str]:
    """Turn what jsonargparse cannot say into what it can.

    `compare-runs DIR...`, `doctor [RECIPE]` and `schedule RECIPE --compare NAME...`.
    """
    name, *rest = arguments or [""]
    own = list(itertools.takewhile(lambda argument: not argument.startswith("-"), rest))
    if name == "compare-runs" and own and not own[0].startswith("["):
        return [name, json.dumps(own), *rest[len(own) :]]
    if name == "schedule" and "--compare" in rest:
        start = rest.index("--compare") + 1
        names = list(itertools.takewhile(lambda argument: not argument.startswith(("-", "[")), rest[start:]))
        if names:
            return [name, *rest[:start], json.dumps(names), *rest[start + len(names) :]]
    if name == "doctor" and own:
        return [name, "--recipe", *rest]
    return list(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command.

    Args:
        arguments: The command line without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit status: what the command says, 2 for a wrong setting or input, 130 after Ctrl-C.
    """
    # litdata, which LitGPT imports, otherwise asks the package index for its newest version and waits if it is offline.
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
    given = normalize(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(given)
    parsed = parser.parse_args(given)
    name = parsed.subcommand
    values = parser.instantiate_classes(parsed)[name].as_dict()
    try:
        return _function(name)(**values) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _function(name: str) -> Callable[..., int | None]:
    module, _, attribute = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
