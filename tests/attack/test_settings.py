"""No value of any setting leads to a traceback, a hang, or is accepted although it means nothing.

Every field of every section is given every value of `values.VALUES`. `MOE_TEST_SETTINGS` says how many of them go
through the whole command line, chosen by seed (`MOE_TEST_SEED`).
"""

import dataclasses
import functools
import importlib
import inspect
import math
import os
import pkgutil
import random
from typing import Any, get_type_hints

import pytest
import yaml

from litgpt_moe_ext.cli import settings, train
from litgpt_moe_ext.cli.settings import make_config
from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.data import corpora as packages
from litgpt_moe_ext.data.corpora.base import Corpus
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import members
from litgpt_moe_ext.training.optim.arguments import learning_rate_of
from litgpt_moe_ext.training.phases.checks import check_model
from tests.attack.command_line import PLACES, CommandLine, as_flag, settings_of_a_recipe
from tests.attack.values import VALUES, fresh, sections, sensible

SEED = int(os.environ.get("MOE_TEST_SEED", "0"))
COUNT = int(os.environ.get("MOE_TEST_SETTINGS", "25"))


def refused(name: str, make: Any) -> bool:
    """Return whether something is refused; in one line that begins with the setting."""
    try:
        make()
    except SettingsError as error:
        message = str(error)
    else:
        return False
    assert "\n" not in message
    assert message.startswith(name), message
    return True


def test_every_field_of_every_section():
    tried = 0
    for section in sections():
        for field in dataclasses.fields(section):
            if isinstance(field.type, str):
                continue  # the model and the data have tests of their own
            name = section.name_of(field.name)
            for value in VALUES:
                tried += 1
                made: list[Any] = []
                # Both a field that is wrong and one that contradicts it are worth a line.
                make = lambda: made.append(section(**{field.name: fresh(value)}))  # noqa: B023, E731
                if not refused(name, make):
                    kept = getattr(made[0], field.name)
                    assert sensible(name, kept), (name, value)
                    assert kept is not None or type(None) in members(field.type), name
    assert tried > 2500


def test_every_field_of_a_model(recipe):
    from litgpt.config import Config

    model = yaml.safe_load(recipe().read_text())["model_config"]
    hints = get_type_hints(Config)
    kinds = {name: {kind for kind in members(hint) if kind in (int, float)} for name, hint in hints.items()}
    for name in (name for name, found in kinds.items() if found):
        for value in (value for value in VALUES if isinstance(value, (int, float)) and not isinstance(value, bool)):
            made: list[Any] = []
            make = lambda: made.append(make_config({**model, name: value}))  # noqa: B023, E731
            if not refused("model_config.", make):
                check_model(made[0])
                assert sensible(f"model_config.{name}", value), (name, value)


@pytest.mark.parametrize(("name", "value"), [("n_head", 0), ("n_query_groups", 0), ("rotary_percentage", float("inf"))])
def test_numbers_of_a_model_that_litgpt_divides_by(recipe, name, value, capsys):
    file = recipe(model_config={name: value})
    assert main(["--config", str(file)]) == 2
    assert f"error: model_config.{name}: {value} must be" in capsys.readouterr().err


def corpora(cls: type[Corpus] = Corpus) -> list[type[Corpus]]:
    for module in pkgutil.iter_modules(packages.__path__):
        importlib.import_module(f"litgpt_moe_ext.data.corpora.{module.name}")
    found = [cls, *(deeper for below in cls.__subclasses__() for deeper in corpora(below))]
    return [one for one in found if one.__module__.startswith("litgpt_moe_ext.data.corpora")]


def test_every_field_of_every_corpus(tmp_path):
    needed = {"source_path": tmp_path, "corpus_dir": tmp_path, "reference": "a/b/c:d", "dataset": "json"}
    for corpus in corpora():
        names = {field.name: field for field in dataclasses.fields(corpus)}
        given = {name: value for name, value in needed.items() if name in names}
        for name, value in ((name, value) for name in names for value in VALUES):
            made: list[Any] = []
            make = lambda: made.append(corpus(**{**given, name: fresh(value)}))  # noqa: B023, E731
            if not refused("", make):
                kept = getattr(made[0], name)
                assert sensible(f"data.{name}", kept), (corpus, name, value)
                assert kept is not None or type(None) in members(names[name].type), name


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor", "litgpt_moe_ext.training.optim.muon.MuonAdamW"])
def test_every_argument_of_an_optimizer(name):
    module, _, cls = name.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module or "torch.optim"), cls)).parameters
    for argument in list(parameters)[1:]:
        for value in VALUES:
            optimizer = {"class_path": name if module else f"torch.optim.{name}", "init_args": {argument: fresh(value)}}
            if not refused("optimizer", lambda: learning_rate_of(optimizer)):  # noqa: B023
                default = parameters[argument].default
                assert type(value) is type(default) or default is None or isinstance(value, (int, float)), value
                assert not isinstance(value, float) or math.isfinite(value), value


DEEP = "a: " + "[" * 1000 + "]" * 1000
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
RECIPES = {
    "empty": "",
    "comments": "# nothing\n",
    "text": "text",
    "a number": "5",
    "a list": "[train]",
    "null": "null",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a number as key": "1: 2",
    "a number as key below": "train: {1: 2}",
    "null as key": "train: {null: 2}",
    "a list as key": "? [a, b]\n: 1\n",
    "a mapping as key": "? {a: b}\n: 1\n",
    "a key twice": "seed: 1\nseed: 2\n",
    "a key twice below": "train:\n  max_steps: 1\n  max_steps: 2\n",
    "itself": "train: &a {max_steps: *a}",
    "itself in a list": "a: &a [*a]",
    "an alias to nothing": "a: *b",
    "deep": DEEP,
    "deep mappings": "a: " + "{a: " * 1000 + "}" * 1000,
    "a bomb": BOMB,
    "an object": "seed: !!python/object/apply:os.getcwd []",
    "an unknown tag": "seed: !thing 3",
    "the 30th of February": "seed: 2020-02-30",
    "a day": "seed: 2020-02-03",
    "a set": "seed: !!set {a, b}",
    "bytes": "seed: !!binary aGVsbG8=",
    "no bytes": "seed: !!binary x",
    "many digits": "seed: " + "9" * 5000,
    "a bracket": "seed: [",
    "a tab": "train:\n\tmax_steps: 1\n",
    "a character that is none": "seed: \x07",
    "a merge of text": "train: {<<: text}",
    "nothing below train": "train:\n  # max_steps: 1\n",
    "text for train": "train: fast",
    "a list for train": "train: [1, 2]",
    "a number for train": "train: 3",
    "no class": "data: {init_args: {}}",
    "a class that is a number": "data: {class_path: 5}",
    "arguments in a list": "data: {class_path: litgpt_moe_ext.data.PythonStdlib, init_args: [1]}",
    "arguments that are null": "data: {class_path: litgpt_moe_ext.data.PythonStdlib, init_args: null, more: 1}",
    "an optimizer with number keys": "optimizer: {1: 2}",
    "no data": "model_name: pythia-14m",
    "a callback that is a number": "callbacks: [5]",
    "a callback that is no callback": "callbacks: [{class_path: collections.Counter}]",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_are_none(tmp_path, capsys, name):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPES[name])
    assert main(["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 1000


@pytest.mark.parametrize("content", [b"\xff\xfe", b"seed: \xe9", bytes(100)])
def test_recipes_that_are_no_text(tmp_path, capsys, content):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert main(["--config", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("path", ["a\0b", "missing.yaml", ".", "x" * 5000])
def test_recipes_that_are_not_there(capsys, path):
    assert main(["--config", path]) == 2
    assert capsys.readouterr().err.startswith("error: --config: ")


def test_a_section_without_lines_says_what_to_do(recipe, capsys):
    file = recipe()
    file.write_text(file.read_text() + "checkpoint:\n  # keep_last: 3\n")
    assert main(["--config", str(file)]) == 2
    assert "error: checkpoint: null must be keys and values; remove the line, or" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ["[", "!!python/object/apply:os.getcwd []", "2020-02-30", "9" * 5000, "&a [*a]", DEEP]
)
def test_flags_that_are_no_yaml(recipe, capsys, value):
    assert main(["--config", str(recipe()), "--train.max_steps", value]) == 2
    assert capsys.readouterr().err.startswith("error: train.max_steps: ")


@pytest.mark.slow
def test_every_field_through_the_parser(tmp_path, monkeypatch, capsys):
    """As flags; the training is left out, and the parser is made once, so that many can be tried."""
    parser, made = settings.build_parser(settings.litgpt_types()), []
    monkeypatch.setattr(settings, "build_parser", lambda _types: parser)
    monkeypatch.setattr(train, "_train", made.append)
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 1\n")
    names = [section.name_of(field.name) for section in sections() for field in dataclasses.fields(section)]
    pairs = [(name, value) for name in names for value in VALUES]
    for name, value in random.Random(SEED).sample(pairs, min(len(pairs), 6 * COUNT)):
        made.clear()
        status = main(["--config", str(file), f"--{name}={as_flag(value)}"])
        error = capsys.readouterr().err
        if made:
            kept = functools.reduce(getattr, name.split("."), made[0])
            assert sensible(name, kept), (name, value, kept)
        else:
            assert status == 2, (name, value)
            assert error.startswith("error: "), (name, value, error)
            assert error.count("\n") == 1, (name, value, error)


@pytest.mark.slow
def test_through_the_command_line(recipe, tmp_path):
    """A wrong value gives one line and exit status 2; one that is accepted trains, or training says why not."""
    tried = [(name, value, place) for name in settings_of_a_recipe() for value in VALUES for place in PLACES]
    statuses = []
    with CommandLine(recipe(), tmp_path / "out") as command:
        for what in random.Random(SEED).sample(tried, COUNT):
            outcome = command.outcome(*what)
            outcome.check(what)
            statuses.append(outcome.status)
    assert {0, 2} <= set(statuses) or COUNT < 20
