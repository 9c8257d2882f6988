"""The base class of callbacks: what it refuses at definition, and what a run calls."""

import builtins
import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.archives import open_archive
from litgpt_moe_ext.training.callback import EVENTS, Callback
from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.fabric import TrainingFabric
from litgpt_moe_ext.training.run import run
from tests.runs import logged
from tests.settings import read_settings


def test_a_misspelt_event_is_an_error_at_definition():
    with pytest.raises(TypeError, match=r"Mine\.on_step_beginn: no event of training .* did you mean on_step_begin\?"):

        class Mine(Callback):
            def on_step_beginn(self, state):
                pass

    with pytest.raises(TypeError, match="events are on_before_setup, on_after_setup"):

        class Other(Callback):
            def on_zzz(self):
                pass


def test_other_arguments_are_an_error_at_definition():
    with pytest.raises(TypeError, match=r"must have the arguments \(self, batch, waited\), not \(self, tokens\)"):

        class Mine(Callback):
            def on_batch(self, tokens):
                pass


def test_a_misspelt_event_of_another_base_class_is_an_error_at_definition():
    class Mixin:
        def on_step_beginn(self, state):
            pass

    with pytest.raises(TypeError, match=r"Mixin\.on_step_beginn: no event of training"):

        class Mine(Mixin, Callback):
            pass


def test_a_method_whose_body_a_call_does_not_run_is_an_error_at_definition():
    with pytest.raises(TypeError, match=r"Later\.on_step_begin: must be a plain function without async and yield"):

        class Later(Callback):
            async def on_step_begin(self, state):
                pass

    with pytest.raises(TypeError, match=r"Lazy\.on_step_begin: must be a plain function without async and yield"):

        class Lazy(Callback):
            def on_step_begin(self, state):
                yield state


@pytest.mark.parametrize("event", ["on_step_begin", "on_batch"])
def test_an_iterator_of_a_callback_that_is_empty_does_not_end_the_training_as_finished(recipe, tmp_path, event):
    class Draws(Callback):
        def on_step_begin(self, state):
            if event == "on_step_begin" and state["step_count"] == 2:
                next(iter(()))

        def on_batch(self, batch, waited):
            if event == "on_batch":
                next(iter(()))

    settings = read_settings(["--config", str(recipe())])
    settings.callbacks = [Draws()]
    with pytest.raises(RuntimeError, match=rf"Draws\.{event} raised StopIteration"):
        run(settings)
    assert not (tmp_path / "out" / "final").exists()


class AddsFiles(Callback):
    def __init__(self, kind: str, message: str) -> None:
        self.kind, self.message = kind, message

    def on_checkpoint_staged(self, directory):
        raise getattr(builtins, self.kind)(self.message)


def test_an_error_in_a_callback_that_adds_files_is_its_own(recipe, tmp_path):
    """Not that of a full disk."""
    settings = read_settings(["--config", str(recipe())])
    settings.callbacks = [AddsFiles("RuntimeError", "shapes do not match")]
    with pytest.raises(RuntimeError, match="^shapes do not match$"):
        run(settings)
    assert not list((tmp_path / "out").glob("step-*"))


def test_a_callback_that_cannot_write_a_file_is_named_in_a_line(recipe, tmp_path):
    settings = read_settings(["--config", str(recipe())])
    settings.callbacks = [AddsFiles("OSError", "no such\nplace")]
    with pytest.raises(TrainingStopped, match="saved: no such place. .* Mend the cause, such as a full disk") as error:
        run(settings)
    assert "\n" not in str(error.value)


def test_a_state_that_could_not_be_opened_again_is_left_out_of_checkpoints(recipe, tmp_path, capsys):
    class Remembers(Callback):
        def state_dict(self):
            return {"best": [np.float64(1.0)]}

    settings = read_settings(["--config", str(recipe())])
    settings.callbacks = [Remembers()]
    run(settings)
    assert "Remembers.state_dict returns a numpy.float64, where checkpoints hold" in capsys.readouterr().out
    saved = open_archive(tmp_path / "out" / "final" / "lit_model.pth", "resume")["callbacks"]
    assert "Remembers" not in saved
    assert "Retention" in saved


def test_what_a_callback_adds_to_a_log_line_is_left_out_where_it_is_no_number(recipe, tmp_path, capsys):
    class Adds(Callback):
        def on_log(self, metrics):
            metrics |= {"mine": torch.tensor([2.5]), "words": "text", 7: 1.0, "loss": None, "moe/max_vio": [1.0]}
            metrics.pop("step", None)

    settings = read_settings(["--config", str(recipe()), "--logger_name", "csv"])
    settings.callbacks = [Adds()]
    run(settings)
    output = capsys.readouterr().out
    for name, kind in (("'words'", "str"), ("7", "float"), ("'loss'", "NoneType"), ("'moe/max_vio'", "list")):
        assert len(re.findall(rf"on_log gives {name} a (builtins\.)?{kind}, where metrics are numbers", output)) == 1
    with open(tmp_path / "out" / "metrics-wide.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["mine"] for row in rows} == {"2.5"}
    assert not {"words", "7"} & rows[0].keys()
    assert all(float(row["loss"]) > 0 for row in rows)


def test_what_a_callback_adds_to_the_state_is_saved_where_it_can_be_opened_again(recipe, tmp_path, capsys):
    class Adds(Callback):
        def on_step_begin(self, state):
            state["plain"], state["other"] = {"best": 1.5}, [object()]

    flags = ["--config", str(recipe())]
    for more in (["--train.max_steps", "4"], ["--resume", "auto"]):
        settings = read_settings([*flags, *more])
        settings.callbacks = [Adds()]
        run(settings)
        assert "state['other'] has a builtins.object" in capsys.readouterr().out
    saved = open_archive(tmp_path / "out" / "final" / "lit_model.pth", "resume")
    assert saved["plain"] == {"best": 1.5}
    assert "other" not in saved


@pytest.mark.parametrize("change", ["adds", "renames", "reshapes"])
def test_other_weights_than_those_of_the_model_config_are_refused(recipe, change):
    """Nothing could open their checkpoints, the resumed run neither."""

    class Changes(Callback):
        def on_before_setup(self, model):
            if change == "adds":
                model.extra = torch.nn.Parameter(torch.zeros(3))
            elif change == "renames":
                model.lm_head = torch.nn.Sequential(model.lm_head)
            else:
                model.lm_head = torch.nn.Linear(16, 320, bias=False)

    named = {"adds": "extra", "renames": "lm_head.0.weight, lm_head.weight", "reshapes": "lm_head.weight"}[change]
    settings = read_settings(["--config", str(recipe())])
    settings.callbacks = [Changes()]
    with pytest.raises(SettingsError, match=rf"callbacks: on_before_setup .* \({named}\), .*; keep weights of"):
        run(settings)


def test_a_model_that_a_callback_leaves_in_evaluation_mode_trains_and_balances(recipe, finished, tmp_path, capsys):
    class Measures(Callback):
        def on_after_setup(self, fabric, module):
            self._model = module.module

        def on_step_begin(self, state):
            (self._model if state["step_count"] % 2 else state["model"]).eval()

    settings = read_settings(["--config", str(recipe())])
    settings.callbacks = [Measures()]
    run(settings)
    assert capsys.readouterr().out.count("has left the model in evaluation mode") == 1
    undisturbed = finished(tmp_path / "undisturbed")
    for column in ("loss", "moe/max_vio", "moe/bias_range"):
        assert logged(tmp_path / "out", column) == logged(undisturbed, column)


def test_every_callback_of_the_package_has_the_base_class():
    """A class in training whose method is called `on_...` is a callback."""
    import re

    root = Path(__file__).resolve().parents[2] / "litgpt_moe_ext" / "training"
    for file in root.rglob("*.py"):
        for block in re.split(r"^class ", file.read_text(encoding="utf-8"), flags=re.M)[1:]:
            name = re.match(r"\w+", block)[0]
            if re.search(r"^    def on_", block, flags=re.M) and name != "Callback":
                assert re.match(r"\w+\(Callback\)", block), f"{file}: {name}"


def test_fabric_calls_and_keeps_the_state_of_two_of_a_class():
    class Counts(Callback):
        def __init__(self) -> None:
            self.lines = 0

        def on_logged(self, metrics):
            self.lines += 1

        def state_dict(self):
            return {"lines": self.lines}

    first, second, silent = Counts(), Counts(), Callback()
    fabric = TrainingFabric(show=print, accelerator="cpu", devices=1, callbacks=[first, silent])
    fabric.call("on_logged", metrics={})
    fabric.add_callback(second)
    fabric.call("on_logged", metrics={})
    assert fabric.callback_states() == {"Counts": {"lines": 2}, "Counts-2": {"lines": 1}}
    for event in set(EVENTS) - {"on_logged"}:
        assert getattr(Callback, event) is getattr(Counts, event)
