"""From a command line or a recipe to typed settings.

Recipes and flags become one tree of plain data (`cli.given`), of which jsonargparse makes settings, checked by type.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from litgpt_moe_ext.cli.given import Given, read_flags
from litgpt_moe_ext.cli.mistakes import mistakes, wrong_nulls
from litgpt_moe_ext.cli.paths import check_paths
from litgpt_moe_ext.config.litgpt_fields import check_names, check_ranges
from litgpt_moe_ext.errors import SettingsError, one_line, refuse_first, which_checkpoint
from litgpt_moe_ext.host.checkpoints import CONFIG_FILE
from litgpt_moe_ext.recipe_files import (
    SECTIONS,
    as_data,
    load_value,
    names_file,
    read_mapping,
    read_recipe,
    without_mark,
)
from litgpt_moe_ext.training.settings import Section, Settings
from litgpt_moe_ext.training.settings.section import attribute_docs, default_of
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from litgpt_moe_ext.study.twin import Equality

MakeModel = Callable[[dict[str, Any]], Any]

SHORT_FORMS = {
    "--micro-batch-size": "--train.micro_batch_size",
    "--global-batch-size": "--train.global_batch_size",
    "--max-seq-length": "--train.max_seq_length",
    "--wandb-dataset": "--wandb_dataset",
    "--wandb-artifacts-dir": "--wandb_artifacts_dir",
}

USAGE = "litgpt-moe train [--config FILE] [--resume auto|true|PATH] [--KEY VALUE ...]"

EPILOG = (
    "Short forms: "
    + ", ".join(f"{short} for {full}" for short, full in SHORT_FORMS.items())
    + "; --progress and --no-progress for --progress true and false. Every key may also stand in the YAML file. "
    "Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP (a closed terminal) finish the step, save, and end with exit status 130, 143, "
    "138 and 129; with SLURM, #SBATCH --signal=SIGUSR1@300 does so five minutes before the time limit. Exit status 1: "
    "training cannot go on, 2: a setting is wrong. --model_config DIR takes the model of a checkpoint. A section, or "
    "data, may stand in a file: --train FILE. --print_config shows all settings, --data.help CLASS those of a data "
    "module."
)


def normalize(arguments: Sequence[str], default_config: Path) -> list[str]:
    """Expand short forms and put `--config` first, so that the other arguments override it.

    Args:
        arguments: As given by the user, without the program's name.
        default_config: Recipe to use if none is named.

    Raises:
        SettingsError: If a `--config` lacks its file.
    """
    configs: list[str] = []
    others: list[str] = []
    waiting = list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name == "--config":
            if not equals and not waiting:
                raise SettingsError("config: needs the path of a YAML file, --config FILE")
            configs += ["--config", value if equals else waiting.pop(0)]
        elif name in ("--no-progress", "--no_progress", "--progress") and not equals:
            given = name == "--progress" and waiting and waiting[0] in ("true", "false", "null")
            others.append(f"--progress={waiting.pop(0) if given else str(name == '--progress').lower()}")
        else:
            others.append(SHORT_FORMS.get(name, name) + equals + value)
    return (configs or ["--config", str(default_config)]) + others


def annotations(types: Mapping[str, Any]) -> dict[str, Any]:
    """Return the type of every top-level setting.

    Args:
        types: Of the settings whose types are LitGPT's.
    """
    return {field.name: types.get(field.name, field.type) for field in dataclasses.fields(Settings)}


def litgpt_types() -> dict[str, Any]:
    """Return the types that LitGPT defines; imports it."""
    import litgpt_moe_ext

    litgpt_moe_ext.register()
    from litgpt.config import Config
    from litgpt.data import DataModule

    return {"model_config": Config | None, "data": DataModule}


def build_parser(types: Mapping[str, Any]) -> Any:
    """Return a jsonargparse parser of `Settings`.

    Args:
        types: As from `litgpt_types`. For a help text, which does not look inside them, `dict` will do.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="litgpt-moe train",
        usage=USAGE,
        description="Pretrain a model with LitGPT.",
        epilog=EPILOG,
        exit_on_error=False,
    )
    docs, kinds = attribute_docs(Settings), annotations(types)
    for field in dataclasses.fields(Settings):
        kind = kinds[field.name]
        if isinstance(kind, type) and issubclass(kind, Section):
            parser.add_class_arguments(kind, field.name, help=docs[field.name])
        else:
            parser.add_argument(
                f"--{field.name}", type=kind, default=default_of(field), metavar="VALUE", help=docs[field.name]
            )
    return parser


def read_given(arguments: Sequence[str], default_config: Path, types: Mapping[str, Any]) -> Given:
    """Return recipes and flags, merged.

    Args:
        arguments: The command line without the program's name.
        default_config: Recipe to use if none is named.
        types: As from `litgpt_types`.

    Raises:
        SettingsError: If a recipe or a flag cannot be read.
    """
    given, known = Given({"optimizer": Settings.optimizer}), annotations(types)
    flags = list(read_flags(normalize(arguments, default_config)))
    for name, text in flags:
        if name == "config":
            given.add_recipe(Path(text))
        elif name == "model_config":
            model, is_whole = _read_model(text)
            if is_whole:
                given.tree.pop(name, None)
            given.add_flag(name, model)
        elif name in SECTIONS and names_file(text):
            given.add_flag(name, read_mapping(Path(text), name)[0])
        elif name != "dense_twin":  # applied last, as it depends on all others
            given.add_text(name, text, known)
        # Flags that follow are read as what the class takes.
        _complete_data_module(given.tree)
    by = dict(flags).get("dense_twin")
    if by is not None:
        _make_dense(given, by, own_out_dir="out_dir" not in dict(flags))
    return given


def _read_model(text: str) -> tuple[Any, bool]:
    # Fields of a model as YAML, or the path of a whole one: a checkpoint directory, or the file in it.
    value = load_value(text, f"model_config: {text!r}")
    if not isinstance(value, str):
        return value, False
    path = Path(value)
    file = path / CONFIG_FILE if path.is_dir() else path
    if file != path and not file.is_file():
        raise SettingsError(f"model_config: {quoted(value)} has no {file.name}{which_checkpoint(path, file.name)}")
    return without_mark(read_recipe(file, "model_config")[0]), True


def _complete_data_module(tree: dict[str, Any]) -> None:
    from litgpt_moe_ext import data

    if "data" in tree:
        tree["data"] = _with_import_path(tree["data"], data.import_path)
    match tree.get("data"):
        case {"init_args": {"corpora": dict(corpora)} as arguments}:
            # A mixture takes this package's only.
            own = {name: f"{data.__name__}.{name}" for name in data.MODULES}
            named = {
                key: _with_import_path(corpus, lambda name: own.get(name, name)) for key, corpus in corpora.items()
            }
            tree["data"] = {**tree["data"], "init_args": {**arguments, "corpora": named}}


def _with_import_path(module: Any, import_path: Callable[[str], str]) -> Any:
    match module:
        case str(name):
            return import_path(name)
        case {"class_path": str(name)}:
            return {**module, "class_path": import_path(name)}
    return module


def _make_dense(given: Given, by: str, own_out_dir: bool) -> None:
    from litgpt_moe_ext.study.recipes import twin_settings

    if by not in ("flops", "parameters"):
        raise SettingsError(f"dense_twin: {by} must be flops or parameters, which says what is equal in both models")
    out_dir = given.tree.get("out_dir")
    given.tree = twin_settings(given.tree, cast("Equality", by))
    if not own_out_dir:
        given.tree["out_dir"] = out_dir


def parse(given: Given, types: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the parser and the parsed settings, a namespace of plain data checked by type.

    Raises:
        SettingsError: If a name is unknown or a value of a wrong type.
    """
    import jsonargparse

    parser, known = build_parser(types), annotations(types)
    refuse_first(wrong_nulls(given.tree, known))
    try:
        # Given null, jsonargparse would look for a class. A copy, as it replaces dictionaries in place.
        tree = {key: deepcopy(value) for key, value in given.tree.items() if key != "data" or value is not None}
        parsed = parser.parse_object(tree)
    except (jsonargparse.ArgumentError, TypeError) as error:
        refuse_first(mistakes(given.tree, known))
        raise SettingsError(one_line(error)) from error
    check_paths(parsed)
    return parser, parsed


def _unchecked(values: dict[str, Any]) -> Any:
    return SimpleNamespace(**{"block_size": 4096, **values})


def make_config(values: dict[str, Any]) -> Any:
    """Return the `litgpt.Config` of a recipe's fields.

    Raises:
        SettingsError: If one is unknown or wrong.
    """
    from litgpt.config import Config

    check_names(values)
    check_ranges(values, "model_config.")
    try:
        return Config(**values)
    except (TypeError, ValueError, AssertionError) as error:  # how LitGPT and this package refuse fields
        name = str(error).partition(":")[0].partition(".")[0]
        separator = "." if name in Config.__dataclass_fields__ else ": "
        raise SettingsError(f"model_config{separator}{error or 'LitGPT refuses these fields'}") from error


def read_plain_settings(recipe: Path, make_model: MakeModel = _unchecked) -> Settings:
    """Return the settings of a recipe without importing LitGPT, unless its model needs it: data stay plain.

    Args:
        recipe: A YAML file, or a checkpoint that holds its hyperparameters.
        make_model: Makes the model of its fields, by default without checking them.

    Raises:
        SettingsError: If it is not a recipe, or a section is wrong.
    """
    inside = recipe / "hyperparameters.yaml"
    given = Given({"optimizer": Settings.optimizer})
    given.add_recipe(inside if inside.is_file() else recipe, "recipe")
    if inside.is_file():
        given.tree = as_data(given.tree, inside)
    with given.naming_places():
        parser, parsed = parse(given, {"model_config": dict | None, "data": dict | str | None})
        return make_settings(parser, parsed, make_model)


def make_settings(parser: Any, parsed: Any, make_model: MakeModel = make_config) -> Settings:
    """Return the settings of a parsed namespace, with its classes instantiated.

    Args:
        parser: The parser.
        parsed: The namespace.
        make_model: Makes the model of its fields.

    Raises:
        SettingsError: If a class refuses its arguments.
    """
    model = parsed.as_dict()["model_config"]
    del parsed["model_config"]
    config = None if model is None else make_model(model)
    return Settings(model_config=config, **vars(parser.instantiate_classes(parsed)))


@contextlib.contextmanager
def settings_of(arguments: Sequence[str], default_config: Path) -> Iterator[Settings]:
    """Yield the settings of a command line; errors about them in the scope give their full names and places.

    Args:
        arguments: Without the program's name.
        default_config: Recipe to use if none is named.

    Raises:
        SettingsError: If anything in it is wrong.
    """
    types = litgpt_types()
    given = read_given(arguments, default_config, types)
    with given.naming_places():
        yield make_settings(*parse(given, types))
