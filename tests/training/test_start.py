"""What a run starts from, whose directory it takes, and on what device: faults that once were there."""

import re
import shutil
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml
from litgpt.utils import save_config

from litgpt_moe_ext.data.loader import corpora_of
from litgpt_moe_ext.data.mixture.settings import RunLength
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.lock import ProcessLock
from litgpt_moe_ext.training.checkpoint.compatibility import require_same_model
from litgpt_moe_ext.training.phases import launch, start
from litgpt_moe_ext.training.phases.checks import check_whole_model
from litgpt_moe_ext.training.phases.inputs import check_data
from litgpt_moe_ext.training.phases.plan import make_plan
from litgpt_moe_ext.training.settings import EvaluateArgs, LogArgs, SampleArgs
from tests.models import moe_config
from tests.runs import logged, recipe_writer, train
from tests.settings import read_settings, recipe_with

SHORT = {"max_tokens": 2 * 128}


def test_a_checkpoint_that_only_the_first_rank_sees(recipe, finished, tmp_path, monkeypatch, capsys):
    """As where `out_dir` is on a disk of its node: the others say so, instead of failing to open the file."""
    finished(tmp_path / "out", step=4)
    found = tmp_path / "elsewhere" / "step-00000004" / "lit_model.pth"
    monkeypatch.setattr(start, "choose_checkpoint", lambda *_: found)
    assert train("--config", recipe(), "--resume", "auto") == 2
    error = capsys.readouterr().err
    assert f"resume: '{found.parent}' is seen by rank 0, but not by rank 0; copy it to that node" in error


def test_weights_and_tokenizer_from_the_directory_that_is_moved_aside(recipe, finished, tmp_path, capsys):
    """As the errors about resuming advise: start anew from the weights of the run in the same `out_dir`."""
    file, final = recipe(train=SHORT), finished(tmp_path / "out") / "final"
    arguments = ("--initial_checkpoint_dir", final, "--tokenizer_dir", final)
    assert train("--config", file, *arguments) == 0, capsys.readouterr().err
    moved = tmp_path / "out-earlier-1" / "final"
    assert (moved / "lit_model.pth").is_file()
    assert (final / "tokenizer.json").is_file(), "the new checkpoint has the tokenizer of the old one"
    settings = yaml.safe_load((final / "hyperparameters.yaml").read_text())
    assert (settings["initial_checkpoint_dir"], settings["tokenizer_dir"]) == (str(moved), str(moved))
    for run in ("out", "out-earlier-1"):
        assert (tmp_path / run / "metrics.csv").is_file()


def test_bare_names_of_checkpoints_are_those_of_litgpt(recipe, tmp_path, monkeypatch):
    """LitGPT downloads into checkpoints/ and lets its commands leave that out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints" / "some" / "model").mkdir(parents=True)
    (tmp_path / "checkpoints" / "some" / "model" / "lit_model.pth").write_bytes(b"")
    file = recipe()
    save_config(make_plan(read_settings(["--config", str(file)])).config, tmp_path / "checkpoints" / "some" / "model")
    plan = make_plan(read_settings(["--config", str(file), "--initial_checkpoint_dir", "some/model"]))
    assert plan.settings.initial_checkpoint_dir == Path("checkpoints/some/model")
    plan = make_plan(read_settings(["--config", str(file), "--tokenizer_dir", "some/model"]))
    assert plan.settings.tokenizer_dir == Path("checkpoints/some/model")
    with pytest.raises(SettingsError, match="initial_checkpoint_dir: 'other/model' does not exist"):
        make_plan(read_settings(["--config", str(file), "--initial_checkpoint_dir", "other/model"]))


def test_data_know_the_steps_of_the_schedule(recipe):
    """Those before which `train.max_steps` ends the run, too: the learning rate does not fall earlier either."""
    told = []

    class Planned:
        def plan_run(self, length):
            told.append(length)

    for flags in ([], ["--train.max_steps", "3"]):
        make_plan(read_settings(["--config", str(recipe()), *flags])).tell_length(Planned())
    assert told == [RunLength(12, 4, 2, 12), RunLength(3, 4, 2, 12)]


def test_a_refused_run_leaves_no_logger_behind(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    lock = ProcessLock(tmp_path / "out" / ".lock")
    lock.take()
    made = []
    monkeypatch.setattr(launch, "_make_logger", lambda plan: made.append(plan))
    try:
        assert train("--config", recipe(), "--logger_name", "tensorboard") == 2
    finally:
        lock.release()
    assert "is in use by process" in capsys.readouterr().err
    assert made == []
    assert not (tmp_path / "out" / "train.log").exists()


def test_the_device_is_decided_once(recipe, monkeypatch, capsys):
    """On a Mac with MPS, which Lightning would take while everything else here says CPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    if torch.cuda.is_available():
        pytest.skip("about machines without CUDA")
    assert train("--config", recipe(train=SHORT)) == 0
    output = capsys.readouterr().out
    assert "This Mac's GPU (MPS) is not used" in output
    assert "on 1 x cpu, 32-true" in output


def test_everybody_waits_until_the_directory_is_free(recipe, tmp_path, monkeypatch):
    """The first process moves the old checkpoints; the others learn where to, which is a rendezvous as well."""
    from types import SimpleNamespace

    from litgpt_moe_ext.training.phases.prepare import Prepared
    from litgpt_moe_ext.training.phases.start import Start, move_earlier_run

    old, moved = tmp_path / "out" / "final", tmp_path / "out-earlier-1" / "final"
    moved.mkdir(parents=True)  # as the first process has left it
    fabric = SimpleNamespace(is_global_zero=False, broadcast=lambda _mine: (moved.parent, None), print=lambda *_: None)
    plan = SimpleNamespace(out_dir=tmp_path / "out", plain={"tokenizer_dir": str(old)})
    start, prepared = move_earlier_run(
        SimpleNamespace(plan=plan, fabric=fabric), Start(None, old), Prepared(None, None, old)
    )
    assert (start.initial_checkpoint_dir, prepared.tokenizer_dir) == (moved, moved)
    assert plan.plain == {"initial_checkpoint_dir": str(moved), "tokenizer_dir": str(moved)}


def test_a_callback_of_ones_own(recipe, tmp_path, capsys):
    """The example: named by a recipe, called by the run, and written down with the other settings."""
    mine = [{"class_path": "examples.add_a_callback.StopWhenGood", "init_args": {"loss": 100}}]
    assert train("--config", recipe(callbacks=mine, train={"save_interval": None})) == 1
    assert "Stopped: the validation loss is" in capsys.readouterr().err
    assert len(logged(tmp_path / "out", "loss")) == 4, "the first validation is good enough"
    saved = tmp_path / "out" / "best" / "hyperparameters.yaml"  # of the step for which it has stopped
    assert yaml.safe_load(saved.read_text())["callbacks"] == [
        {"class_path": "examples.add_a_callback.StopWhenGood", "init_args": {"loss": 100.0}}
    ]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [({"sample": SampleArgs(prompts=["a"])}, "sample.prompts"), ({"evaluate": EvaluateArgs(tasks=["a"])}, "evaluate")],
)
def test_what_needs_a_tokenizer_is_known_at_the_start(changes, setting):
    """Of data without one, such as LitGPT's."""
    config = moe_config()
    settings = replace(recipe_with(config).settings, data=SimpleNamespace(), **changes)
    with pytest.raises(SettingsError, match=f"{setting}: needs a tokenizer; give tokenizer_dir"):
        check_data(settings, config)
    check_data(replace(settings, tokenizer_dir=Path("tokenizer")), config)


@pytest.mark.parametrize(
    ("whole", "compiled", "message"),
    [(False, False, "needs the whole output head on every process"), (True, True, "cannot be compiled; set compile")],
)
def test_a_fused_loss_needs_a_whole_head_that_is_not_compiled(whole, compiled, message):
    settings = read_settings(["--fused_cross_entropy", "true"])
    check_whole_model(settings, whole=True, compiled=False)
    with pytest.raises(SettingsError, match=f"fused_cross_entropy: true {message}"):
        check_whole_model(settings, whole, compiled)


def test_arguments_that_a_callback_does_not_keep(recipe):
    from litgpt_moe_ext.training.callback import Callback
    from litgpt_moe_ext.training.checkpoint.hyperparameters import to_plain

    class Keeps(Callback):
        def __init__(self, loss: float) -> None:
            self._loss = loss

    class Forgets(Callback):
        def __init__(self, loss: float) -> None:
            pass

    class Color(Enum):
        RED = "red"

    class Slots(Callback):
        __slots__ = ("loss",)

        def __init__(self, loss: float) -> None:
            self.loss = loss

    assert to_plain(Keeps(2.0))["init_args"] == {"loss": 2.0}
    assert to_plain(LogArgs(run="a")) == {"run": "a", "log_model": False, "save_logs": True}
    with pytest.raises(SettingsError, match=r"^callbacks\.0: .*Forgets must keep its argument loss as an attribute"):
        to_plain([Forgets(2.0)], "callbacks")
    assert to_plain(Slots(2.0))["init_args"] == {"loss": 2.0}
    assert to_plain(Keeps(Color.RED))["init_args"] == {"loss": "red"}
    with pytest.raises(SettingsError, match=r"callbacks\.0\.loss: <object"):
        to_plain([Keeps(object())], "callbacks")


def test_one_command_starts_from_weights_and_goes_on_afterwards(recipe, finished, tmp_path, capsys):
    """As a job that is put back into its queue, and the last line of a run, have it."""
    weights = (finished(tmp_path / "first") / "final").rename(tmp_path / "weights")
    arguments = ("--config", recipe(train=SHORT), "--initial_checkpoint_dir", weights, "--resume", "auto")
    assert train(*arguments) == 0, capsys.readouterr().err
    assert f"Starting from the weights in {weights}" in capsys.readouterr().out
    (weights / "lit_model.pth").unlink()  # nobody needs them any more
    assert train(*arguments, "--train.max_tokens", 3 * 128) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert f"Resuming from {tmp_path / 'out' / 'final'}" in output
    assert "initial_checkpoint_dir is ignored: the run continues with its own weights" in output
    assert len(logged(tmp_path / "out", "loss")) == 3
    assert train(*arguments[:-1], "true") == 2
    assert "resume: 'True' must be auto or false beside initial_checkpoint_dir" in capsys.readouterr().err


def test_weights_in_the_directory_of_the_run_are_no_checkpoint_of_it(recipe, finished, tmp_path, capsys):
    """Nothing resumes from them, moves them aside or counts them, whether the run is new or goes on."""
    final = finished(tmp_path / "first") / "final"
    initial = tmp_path / "out" / "initial"
    initial.mkdir(parents=True)
    for name in ("model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(final / name, initial)
    state = torch.load(final / "lit_model.pth", weights_only=True)
    arguments = ("--config", recipe(train=SHORT), "--initial_checkpoint_dir", initial, "--resume", "auto")
    for content, tokens in ((state["model"], 2 * 128), ({"model": state["model"]}, 3 * 128)):
        torch.save(content, initial / "lit_model.pth")
        assert train(*arguments, "--train.max_tokens", tokens) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert f"Starting from the weights in {initial}" in output
    assert f"Resuming from {tmp_path / 'out' / 'final'}" in output
    assert not list(tmp_path.glob("out-earlier-*"))

    # Under the name of a checkpoint they could be written over.
    (tmp_path / "other").mkdir()
    named = initial.rename(tmp_path / "other" / "final")
    other = ("--config", recipe(train=SHORT), "--out_dir", tmp_path / "other", "--initial_checkpoint_dir", named)
    assert train(*other, "--resume", "auto") == 2
    assert f"resume: '{named}' holds weights alone" in capsys.readouterr().err
    assert train(*other) == 0, capsys.readouterr().err
    assert (tmp_path / "other-earlier-1" / "final" / "lit_model.pth").is_file()


@pytest.mark.parametrize("name", ["ema", "imported"])
def test_weights_alone_are_not_resumed_from(recipe, tmp_path, capsys, name):
    """They are refused before an earlier run is moved out of the way of a new one."""
    file = recipe(train=SHORT, ema={"decay": 0.5})
    assert train("--config", file) == 0
    average = tmp_path / "out" / "final" / "ema"
    if name == "imported":
        average = shutil.move(average, tmp_path / name)
    capsys.readouterr()
    assert train("--config", file, "--resume", average) == 2
    error = capsys.readouterr().err
    assert f"error: resume: '{average}' holds weights alone, without the state of a training; " in error
    assert (f"resume '{tmp_path / 'out' / 'final'}', or start a new run from its weights" in error) == (name == "ema")
    assert (tmp_path / "out" / "final").is_dir()


class TestContext:
    """Weights go on with rows that are read otherwise; any other difference is a model that they were not made for."""

    YARN = '{"factor": 2.0, "original_max_seq_len": 32, "beta_fast": 32.0, "beta_slow": 1.0}'
    LEARNED: ClassVar = {"position_embedding": "learned", "rotary_percentage": 0}

    @pytest.fixture
    def config(self, recipe):
        def make(settings):
            flags = [f"--model_config.{name}={value}" for name, value in settings.items()]
            return make_plan(read_settings(["--config", str(recipe()), *flags])).config

        return make

    def test_longer_with_yarn(self, recipe, finished, tmp_path, capsys):
        weights = finished(tmp_path / "first") / "final"
        longer = ("--model_config.block_size", 64, "--model_config.rope_adjustments", self.YARN)
        documents = {"attention_document_boundary": "eos", "attention_document_token_id": 0}
        flags = [flag for name, value in documents.items() for flag in (f"--model_config.{name}", value)]
        arguments = ("--config", recipe(train=SHORT), "--initial_checkpoint_dir", weights)
        assert train(*arguments, *longer, *flags, "--train.max_tokens", 2 * 256) == 0, capsys.readouterr().err
        output = capsys.readouterr().out
        for line in (
            "model_config.block_size was 32 for these weights and is 64 now",
            "model_config.rope_adjustments was null for these weights and is {'factor': 2.0,",
            "model_config.attention_document_boundary was null for these weights and is eos now",
        ):
            assert line in output

    @pytest.mark.parametrize(
        ("before", "now", "message"),
        [
            ({"block_size": 64, "rope_adjustments": YARN}, {"block_size": 128}, "rope_adjustments is"),
            ({}, {"rope_adjustments": YARN}, "rope_adjustments is None in the checkpoint"),
            ({"rope_base": 50000}, {"block_size": 64}, "rope_base is 50000 in the checkpoint and 10000 now"),
            ({}, {"rope_base": 50000}, "rope_base is 10000 in the checkpoint and 50000 now"),
            (
                LEARNED,
                {**LEARNED, "block_size": 64},
                "block_size is 32 in the checkpoint and 64 now",
            ),
        ],
        ids=["forgotten", "without-length", "lower-base", "base-without-length", "learned"],
    )
    def test_what_was_forgotten(self, before, now, message, config, tmp_path):
        save_config(config(before), tmp_path)
        with pytest.raises(SettingsError, match="holds another model: ") as raised:
            require_same_model("initial_checkpoint_dir", tmp_path, config(now))
        assert message in str(raised.value)

    @pytest.mark.parametrize(
        ("before", "now"),
        [
            ({}, {"block_size": 64, "rope_base": 50000}),
            ({}, {"block_size": 16}),
            (LEARNED, {**LEARNED, "attention_document_boundary": "eos", "attention_document_token_id": 0}),
        ],
        ids=["higher-base", "shorter", "documents"],
    )
    def test_what_may_differ(self, before, now, config, tmp_path):
        """But not where a run goes on, with what its optimizer and its data know."""
        save_config(config(before), tmp_path)
        require_same_model("initial_checkpoint_dir", tmp_path, config(now))
        with pytest.raises(SettingsError, match="^resume: .* holds another model: "):
            require_same_model("resume", tmp_path, config(now))


GROUPED = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2, "norm_topk_prob": False}
SOFTMAX = {"router_score_function": "softmax", "norm_topk_prob": True}


@pytest.mark.parametrize(
    ("before", "now", "other", "message"),
    [
        ({}, SOFTMAX, {}, "router_score_function is 'softmax' in the checkpoint and 'sigmoid' now"),
        pytest.param(
            {"norm_topk_prob": False},
            {"mlp_class_name": "NoisyTopKMoE", "norm_topk_prob": None, "router_bias_update_rate": None},
            {**SOFTMAX, "mlp_activation": "relu"},
            "mlp_activation is 'swiglu' in the checkpoint and 'relu' now",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(GROUPED, GROUPED, {**GROUPED, "norm_topk_prob": True}),
            "norm_topk_prob is False in the checkpoint and True",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["softmax", "noisy", "grouped"],
)
def test_weights_of_llama_moe(recipe, tmp_path, capsys, monkeypatch, before, now, other, message):
    """The same weights in the same model: the first loss is where the other training ended."""
    # LitGPT leaves the weights of this router as it finds them in memory.
    initialize = lambda router: torch.nn.init.normal_(router.weight, std=0.02)  # noqa: E731
    monkeypatch.setattr("litgpt.model.GroupedTopkRouter.reset_parameters", initialize, raising=False)
    plain = {"attention_class_name": None, "router_bias_update_rate": None, "mlp_class_name": "LLaMAMoE"}
    file = recipe("llama", model_config={**plain, **before})
    assert train("--config", file, "--out_dir", tmp_path / "llama") == 0, capsys.readouterr().err
    ours = {"attention_class_name": None, **now}
    start = ("--initial_checkpoint_dir", tmp_path / "llama" / "final", "--eval.initial_validation", "true")
    assert train("--config", recipe(train=SHORT, model_config=ours), *start) == 0, capsys.readouterr().err
    ended, began = (
        re.findall(r"\n  validation loss ([\d.]+)", (tmp_path / run / "train.log").read_text())
        for run in ("llama", "out")
    )
    assert float(began[0]) == pytest.approx(float(ended[-1]), abs=2e-4)
    assert train("--config", recipe("other", model_config={"attention_class_name": None, **other}), *start) == 2
    assert message in capsys.readouterr().err


class TestOtherData:
    """A resume on other data is refused before they are prepared, which may take hours."""

    def test_refused(self, corpus_settings, tmp_path, capsys):
        own = {**corpus_settings, "source_path": str(tmp_path / "source"), "data_path": str(tmp_path / "prepared")}
        shutil.copytree(corpus_settings["source_path"], own["source_path"])
        file, prepared = recipe_writer(tmp_path, own)(train={"max_tokens": 128}), tmp_path / "prepared"
        assert train("--config", file) == 0, capsys.readouterr().err
        (corpus,) = (path.name for path in prepared.iterdir() if path.is_dir())
        shutil.copytree(tmp_path / "out" / "final", tmp_path / "copy")
        arguments = ("--config", file, "--resume", "auto", "--train.max_tokens", 256)

        def refused(*flags):
            assert train(*arguments, *flags) == 2
            error = capsys.readouterr().err
            assert f"resume: '{tmp_path / 'out' / 'final'}' was trained on the corpus {corpus}, but the" in error
            assert not [path for path in prepared.iterdir() if path.is_dir() and path.name != corpus]
            return error

        for tokenizer in ((), ("--tokenizer_dir", tmp_path / "copy")):
            error = refused("--data.vocab_size", 280, *tokenizer)
            assert " (data.vocab_size 300 -> 280); resume with the original data" in error
        assert " (data.val_count null -> 2); resume with" in refused("--data.val_count", 2)
        (tmp_path / "source" / "new.py").write_text("new = 1")
        assert " (other source files or another tokenizer); resume with" in refused()

    def test_a_mixture(self):
        state = {"fingerprint": {"corpora": [["stories", "a1:pad", 3], ["code", "b2", 4]]}}
        assert corpora_of(state) == {"a1", "b2"}
        assert corpora_of({"fingerprint": {"corpus": "a1:10 documents"}}) == {"a1"}
        assert corpora_of({"current_epoch": 0}) == corpora_of(None) == set()
