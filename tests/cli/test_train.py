"""The command line: short forms, precedence, one line for what is wrong."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from litgpt.config import Config

from litgpt_moe_ext.cli import elsewhere
from litgpt_moe_ext.cli.given import Given, read_flags
from litgpt_moe_ext.cli.settings import litgpt_types, normalize, read_given
from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.config.fields import FIELDS
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.recipes import load_recipe
from litgpt_moe_ext.recipe_files import SECTIONS, load_value, read_recipe
from litgpt_moe_ext.training.checkpoint.resume import find_resume_file
from litgpt_moe_ext.training.settings import Section, Settings
from tests.settings import read_settings

DEFAULT = Path("default.yaml")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["--config", "default.yaml"]),
        (["--config", "a.yaml"], ["--config", "a.yaml"]),
        (["--seed", "1", "--config=a.yaml"], ["--config", "a.yaml", "--seed", "1"]),
        (["--config", "a.yaml", "--config", "b.yaml"], ["--config", "a.yaml", "--config", "b.yaml"]),
        (["--micro-batch-size", "4"], ["--config", "default.yaml", "--train.micro_batch_size", "4"]),
        (["--global-batch-size=8"], ["--config", "default.yaml", "--train.global_batch_size=8"]),
        (["--max-seq-length", "64"], ["--config", "default.yaml", "--train.max_seq_length", "64"]),
        (["--progress"], ["--config", "default.yaml", "--progress=true"]),
        (["--no_progress"], ["--config", "default.yaml", "--progress=false"]),
        (["--no-progress", "--seed", "1"], ["--config", "default.yaml", "--progress=false", "--seed", "1"]),
        (["--progress", "false"], ["--config", "default.yaml", "--progress=false"]),
        (["--progress", "null"], ["--config", "default.yaml", "--progress=null"]),
        (["--resume", "auto"], ["--config", "default.yaml", "--resume", "auto"]),
    ],
    ids=str,
)
def test_normalize(given, expected):
    assert normalize(given, DEFAULT) == expected


def test_command_line_beats_file_beats_default(recipe):
    first, second = recipe("first"), recipe("second", seed=3, train={"max_tokens": 256})
    settings = read_settings(["--train.max_tokens", "999", "--config", str(first), "--config", str(second)])
    assert (settings.seed, settings.train.max_tokens) == (3, 999)
    assert settings.train.micro_batch_size == 2, "from the first file"
    assert settings.num_nodes == 1, "the default"


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("resume", "auto", "auto"),
        ("resume", "true", True),
        ("resume", "false", False),
        ("resume", "some/dir", Path("some/dir")),
        ("compile", "auto", "auto"),
        ("compile", "true", True),
        ("devices", "2", 2),
        ("train.max_tokens", "3e4", 30_000),
        ("train.min_lr", "3e-4", 3e-4),
        ("log.run", "123", "123"),
        ("model_config.n_shared_expert", "null", None),
        ("model_config.rope_base", "500000", 500_000),
        ("model_config.rope_base", "10000.5", 10_000.5),
        ("model_config.attention_scores_scalar", "7.5", 7.5),
        ("data.vocab_size", "400", 400),
        ("data.init_args.vocab_size", "400", 400),
        ("sample.prompts+", "x", ["x"]),
    ],
)
def test_flags(recipe, given, name, expected):
    value = read_settings([f"--{name}", given], recipe())
    for part in name.removesuffix("+").replace(".init_args", "").split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected) or isinstance(value, Path)


@pytest.mark.parametrize("name", ["optimizer.lr", "optimizer.init_args.lr"])
@pytest.mark.parametrize("rate", ["3e-4", "1e-3", "0.125"])
def test_learning_rates_as_people_write_them(recipe, name, rate):
    optimizer = read_settings([f"--{name}", rate], recipe()).optimizer
    assert optimizer == {"class_path": "torch.optim.AdamW", "init_args": {"lr": float(rate)}}


def test_another_optimizer(recipe):
    """Its name replaces the recipe's with its arguments; what follows is the new one's."""
    assert read_settings(["--optimizer", "SGD"], recipe()).optimizer == "SGD"
    given = ["--optimizer", "SGD", "--optimizer.lr=1e-1", "--optimizer.momentum", "0.9"]
    expected = {"class_path": "SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
    assert read_settings(given, recipe()).optimizer == expected


def test_a_short_name_with_arguments_trains(recipe):
    arguments = ["--optimizer", "SGD", "--optimizer.lr", "1e-1", "--train.max_tokens", "256"]
    assert main(["--config", str(recipe()), *arguments]) == 0


def test_print_config(recipe, capsys):
    given = ["--print_config", "--optimizer.lr", "0.5", "--model_config.n_shared_expert", "null"]
    assert main(["--config", str(recipe()), *given]) == 0
    output = capsys.readouterr().out
    for line in ("mlp_class_name: SharedExpertMoE", "lr: 0.5", "n_shared_expert: null", "n_expert: 8", "seed: 42"):
        assert line in output


def test_sections_in_files_of_their_own(recipe, tmp_path, monkeypatch, capsys):
    """As in `litgpt pretrain`: a flag names one from the working directory, a recipe one beside it."""
    sections = {
        field.name
        for field in dataclasses.fields(Settings)
        if inspect.isclass(field.type) and issubclass(field.type, Section)
    }
    assert sorted(SECTIONS) == sorted({"data", *sections})
    (tmp_path / "train.json").write_text('{"max_tokens": 512, "lr_warmup_steps": 3}')
    (tmp_path / "data.yaml").write_text("class_path: PythonStdlib\ninit_args: {vocab_size: 300}\n")
    apart = tmp_path / "apart.yaml"
    apart.write_text("train: train.json\ndata: data.yaml\n")
    monkeypatch.chdir(tmp_path)
    flags = ["--train", "train.json", "--data=data.yaml"]
    for given in (["--config", str(recipe()), *flags], ["--config", str(recipe()), "--config", "apart.yaml"]):
        settings = read_settings([*given, "--train.max_tokens", "1024"])
        assert (settings.train.max_tokens, settings.train.lr_warmup_steps) == (1024, 3)
        assert settings.train.micro_batch_size == 2, "from the recipe"
        assert settings.data.vocab_size == 300
    monkeypatch.chdir("/")
    assert read_recipe(apart)[0]["train"] == {"max_tokens": 512, "lr_warmup_steps": 3}
    apart.write_text("seed: 1\nschedule: apart.yaml\neval: nothing.yaml\n")
    for arguments, message in (
        (["--log", str(tmp_path / "no.yaml")], f"log: '{tmp_path / 'no.yaml'}' cannot be read (No such file"),
        (["--config", str(apart)], f"eval: '{tmp_path / 'nothing.yaml'}' cannot be read (No such file"),
        (["--train", str(recipe())], ": no setting has this name; known are save_interval"),
        (["--train", "train.txt"], "train: 'train.txt' must be keys and values"),
    ):
        assert main(["--config", str(recipe()), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_model_of_a_checkpoint(recipe, finished, tmp_path, capsys):
    """By its directory or its file, in place of that of the recipe; and its lines in a recipe."""
    final = finished(tmp_path / "out") / "final"
    file = final / "model_config.yaml"
    trained = read_settings(["--config", str(recipe())]).model_config
    other = ["--config", str(recipe("other", model_config={"n_embd": 32, "first_k_dense_replace": 1}))]
    for path in (final, file):
        assert read_settings([*other, "--model_config", str(path)]).model_config == trained
    assert read_settings([*other, f"--model_config={final}", "--model_config.n_layer", "1"]).model_config.n_layer == 1
    copied = recipe("copied", model_config=yaml.safe_load(file.read_text()))
    assert "_requires_litgpt_moe_ext" in copied.read_text()
    assert read_settings(["--config", str(copied)]).model_config == trained == load_recipe(copied).config
    for path, hint in ((final.parent, f"did you mean {final}?"), (tmp_path / "data", "name a checkpoint")):
        path.mkdir(exist_ok=True)
        assert main([*other, "--model_config", str(path)]) == 2
        assert f"model_config: '{path}' has no model_config.yaml; {hint}" in capsys.readouterr().err


def test_print_config_leaves_out_nulls(recipe, capsys):
    assert main(["--config", str(recipe()), "--train.max_steps", "null", "--print_config=skip_null"]) == 0
    output = capsys.readouterr().out
    assert "n_expert: 8" in output
    assert "max_steps" not in output


def test_what_is_printed_is_a_recipe(recipe, tmp_path, capsys):
    assert main(["--config", str(recipe()), "--print_config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again, first = (read_settings(["--config", str(f)]) for f in (tmp_path / "printed.yaml", recipe()))
    assert (again.train, again.model_config, again.optimizer) == (first.train, first.model_config, first.optimizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule.name", "cosin"], "schedule.name: 'cosin' must be one of cosine, onecycle, wsd"),
        (["--train.max_tokens=much"], "train.max_tokens: 'much' must be an integer of at least 1"),
        (["--train.max_steps=much"], "train.max_steps: 'much' must be an integer of at least 1, or null"),
        (["--model_config.n_shared_expert", "x"], "model_config.n_shared_expert: 'x' must be an integer, or null"),
        (["--model_config.norm_class_name", "x"], "norm_class_name: 'x' must be one of LayerNorm or RMSNorm"),
        (["--precision", "16-true"], "precision: '16-true' must be one of bf16-true, bf16-mixed, 16-mixed or 32-true"),
        (["--compile", "maybe"], "compile: 'maybe' must be true or false or auto"),
        (["--print_config=comments"], "--print_config: 'comments' must be skip_null, or nothing"),
        (["--evaluate.tasks", "a.yaml"], "evaluate.tasks: 'a.yaml' must be a list such as [a, b]"),
        (["--parameter_groups.no_weight_decay", "norms"], "no_weight_decay: 'norms' must be a list with any of norms"),
        (["--train.global_batch_size", "null"], "train.global_batch_size: null must be an integer of at least 1"),
        (["--data.vocab_size", "x"], "data.vocab_size: 'x' must be an integer"),
        (["--data", "TextCorpus"], "data.source_path: must be given for litgpt_moe_ext.data.TextCorpus"),
        (
            ["--data", "mine.Data"],
            "(No module named 'mine'); Python finds what is installed, or in a folder that PYTHON",
        ),
        (
            ["--data", "foo"],
            "it cannot be imported (it names no module)",
        ),
        (["--model_config.n_embd", "null"], "model_config.n_embd: null must be an integer"),
        (["--model_config.n_exprt", "null"], "did you mean model_config.n_expert?"),
        (["--optimizer", "Adamw"], "did you mean AdamW?"),
        (["--optimizer", "null"], "optimizer: null must be text or keys and values"),
        (
            ["--data", "os.path"],
            "data.class_path: 'os.path' must be the import path of a DataModule; it is not a class",
        ),
        (["--data", "builtins.dict"], "data.class_path: 'builtins.dict' must be the import path of a DataModule"),
        (["--data", "torch.nn.Linear"], "'torch.nn.Linear' must be the import path of a DataModule; it is another"),
        (["--callbacks+", "null"], "callbacks.0: null must be a Callback, by class_path and init_args"),
        (["--callbacks", "[{class_path: os.path}]"], "callbacks.0.class_path: 'os.path' must be the import path of a"),
        (["--callbacks", "[{class_path: a.B}]"], "callbacks.0.class_path: 'a.B' must be the import path of a Callback"),
        (["--trian.max_tokens", "3"], "trian: no setting has this name; did you mean train?"),
        (["--train.lr_warmup_step", "3"], "did you mean train.lr_warmup_steps?"),
        (["--max_tokens", "3"], "max_tokens: no setting has this name; did you mean train.max_tokens?"),
        (["--val-count", "3"], "val-count: no setting has this name; did you mean data.val_count?"),
        (["--packing", "pad"], "packing: no setting has this name; did you mean data.packing?"),
        (["--lr", "3e-4"], "lr: no setting has this name; did you mean optimizer.lr?"),
        (["--train.learning_rate", "3e-4"], "no setting has this name; did you mean optimizer.lr?"),
        (["--save_steps", "3"], "save_steps: no setting has this name; did you mean train.save_interval?"),
        (["--model_config.hidden_size", "3"], "no setting has this name; did you mean model_config.n_embd?"),
        (["--model_config.tie_word_embeddings", "true"], "did you mean train.tie_embeddings?"),
        (["--batch_size", "3"], "batch_size: no setting has this name; did you mean train.micro_batch_size?"),
        (["--zzzz", "3"], "zzzz: no setting has this name ("),
        (["--confg", "x"], "confg: no setting has this name; did you mean config?"),
        (["--ema.zzz", "3"], "ema.zzz: no setting has this name; known are decay"),
        (["--data", "TextCorpus", "--data.size", "3"], "data.size: no setting has this name; known are packing, sh"),
        (["--data", "TextCorpus", "--data.vocab_size", "3"], "did you mean data.bpe.vocab_size?"),
        (["--=3"], "'--=3' must be a flag, --NAME VALUE"),
        (["--train.=3"], "'--train.=3' must be a flag, --NAME VALUE"),
        (["--model_name", "pythia-14m"], "model_name: 'pythia-14m' has no effect beside model_config"),
        (["--wandb-artifacts-dir", "x"], "wandb_artifacts_dir: 'x' has no effect without wandb_dataset"),
        (["recipe.yaml"], "'recipe.yaml' must be a flag, --NAME VALUE; a recipe is given as --config recipe.yaml\n"),
        (["pythia-14m"], "a recipe is given as --config pythia-14m, a model of LitGPT as --model_name pythia-14m"),
        (["-config", "recipe.yaml"], "'-config' must be a flag, --NAME VALUE; did you mean --config?"),
        (["--optimizer.lr"], "optimizer.lr: needs a value"),
        (["--config"], "config: needs the path of a YAML file"),
    ],
    ids=str,
)
def test_wrong_flags_are_named(recipe, capsys, arguments, message):
    file = recipe()
    assert main(["--config", str(file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message.removesuffix(" (") in error
    assert str(file) not in error, "what a flag says stands in no file"
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message", "key"),
    [
        ({"schedule": {"name": "cosin"}}, "schedule.name: 'cosin' must be one of cosine", "  name: cosin"),
        ({"model_config": {"n_layer": "x"}}, "model_config.n_layer: 'x' must be an integer", "  n_layer: x"),
        ({"seed": "x"}, "seed: 'x' must be an integer from 0", "seed: x"),
        ({"train": {"max_norm": -1}}, "train.max_norm: -1 must be a number above 0", "  max_norm: -1"),
        ({"model_config": {"n_exprt": 4}}, "did you mean model_config.n_expert?", "  n_exprt: 4"),
        ({"trian": {"max_tokens": 3}}, "did you mean train?", "trian:"),
        ({"model_config": {"n_expert_per_token": 9}}, "n_expert_per_token: 9 must be", "  n_expert_per_token: 9"),
        (
            {"optimizer": {"init_args": {"lr": 0.1, "beta": 1}}},
            "optimizer.init_args.beta: AdamW has no such argument; did you mean betas?",
            "    beta: 1",
        ),
        (
            {"optimizer": {"init_args": None, "init_arg": {"lr": 0.1}}},
            "optimizer.init_arg: has no effect beside class_path; did you mean optimizer.init_args?",
            "  init_arg:",
        ),
        (
            {"optimizer": {"weight_decay": 0.1}},
            "optimizer.weight_decay: has no effect beside class_path, and arguments stand in its init_args: "
            "optimizer.init_args.weight_decay",
            "  weight_decay: 0.1",
        ),
        ({"data": {"init_arg": {"seed": 1}}}, "data.init_arg: has no effect beside class_path; did you", "  init_arg:"),
        ({"train": {"global_batch_size": 7}}, "train.global_batch_size: 7 is not a multiple", "  global_batch_size: 7"),
    ],
    ids=str,
)
def test_wrong_values_of_a_file_have_a_line(recipe, capsys, changes, message, key):
    file = recipe(**changes)
    line = file.read_text().splitlines().index(key) + 1
    assert main(["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.endswith(f" ({file}:{line})\n")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it must consist of lines KEY: VALUE"),
        (b"- seed: 1\n", "holds no settings"),
        (b"seed: 1\ntrain: [1, 2\n", "line 3 is not YAML"),
        (b"seed: 1\ntrain:\n  max_tokens: 1\n  max_norm: 2\n  max_tokens: 3\n", "line 5 repeats train.max_tokens"),
        (b"\x9d\xff", "is not a text file in UTF-8"),
        ("seed: 1\n".encode("utf-16"), "invalid start byte); save it as one"),
        (None, "cannot be read (No such file"),
    ],
    ids=["empty", "list", "syntax", "repeated", "binary", "utf-16", "missing"],
)
def test_files_that_are_no_recipes(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=re.escape(message)) as error:
        read_recipe(file)
    assert str(file) in str(error.value)


def test_a_wrong_file_ends_the_command(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("")
    assert main(["--config", str(tmp_path / "empty.yaml")]) == 2
    assert f"--config: '{tmp_path / 'empty.yaml'}' is empty" in capsys.readouterr().err


def test_resume_from_a_run(tmp_path):
    """The directory of a run stands for its newest whole checkpoint."""
    for step in (1, 2):
        directory = tmp_path / f"step-0000000{step}"
        directory.mkdir()
        torch.save({"model": {}, "optimizer": {}}, directory / "lit_model.pth")
        (directory / "model_config.yaml").write_text("")
    assert find_resume_file(tmp_path, Path("elsewhere")) == tmp_path / "step-00000002" / "lit_model.pth"
    with pytest.raises(SettingsError, match="is not a whole checkpoint"):
        find_resume_file(tmp_path / "nothing", Path("elsewhere"))


class TestGiven:
    def test_only_what_a_file_says_has_a_line(self, tmp_path):
        file = tmp_path / "recipe.yaml"
        file.write_text("optimizer:\n  class_path: SGD\n  init_args:\n    lr: abc\ntrain:\n  max_norm: -1\n")
        given = Given()
        given.add_recipe(file)
        assert given.place_of("train.max_norm") == f"{file}:6"
        assert given.place_of("optimizer.init_args.lr") == given.place_of("optimizer.lr") == f"{file}:4"
        assert given.place_of("train.save_interval") == f"{file}:5"
        assert given.place_of("seed") == ""
        given.add_flag("train.max_norm", -1)
        given.add_flag("optimizer.lr", 3)
        assert given.place_of("train.max_norm") == given.place_of("optimizer.init_args.lr") == ""
        assert given.tree == {
            "optimizer": {"class_path": "SGD", "init_args": {"lr": 3}},
            "train": {"max_norm": -1},
        }

    def test_names_of_users_have_a_line_too(self, tmp_path):
        file = tmp_path / "recipe.yaml"
        file.write_text("data:\n  corpora:\n    my-code:\n      vocab_size: 1\ncallbacks:\n- class_path: X\n")
        given = Given()
        given.add_recipe(file)
        assert given.place_of("callbacks.0.class_path") == f"{file}:6"
        with pytest.raises(SettingsError, match=re.escape(f"must be 2 ({file}:4)")), given.naming_places():
            raise SettingsError("data.corpora.my-code.vocab_size: 1 must be 2")

    @pytest.mark.parametrize(
        ("raised", "named"),
        [
            ("val_fraction: 0 is little", "data.val_fraction: 0 is little"),
            ("bpe.vocab_size: 1 is little", "data.bpe.vocab_size: 1 is little"),
            ("tokenizer_dir: x is both", "tokenizer_dir: x is both"),
            ("pattern: x is not given", "pattern: x is not given"),
            ("no name at all", "no name at all"),
        ],
    )
    def test_data_that_names_its_own_settings(self, tmp_path, raised, named):
        """Flags need the whole name; what the user has given in two places stays as it was raised."""
        given = Given()
        (tmp_path / "old").write_text("data: {class_path: A, init_args: {pattern: x}}")
        given.add_recipe(tmp_path / "old")
        settings = {"val_fraction": 0, "bpe": {"vocab_size": 1}, "tokenizer_dir": "x"}
        for name, value in (("data", "B"), *((f"data.{key}", value) for key, value in settings.items())):
            given.add_flag(name, value)
        given.add_flag("tokenizer_dir", "x")
        with pytest.raises(SettingsError, match=f"^{re.escape(named)}$"), given.naming_places():
            raise SettingsError(raised)

    def test_another_class_has_other_arguments(self, tmp_path):
        given = Given()
        for name, text in (("a", "data: {class_path: A, init_args: {x: 1}}"), ("b", "data: {class_path: B}")):
            (tmp_path / name).write_text(text)
            given.add_recipe(tmp_path / name)
        assert given.tree == {"data": {"class_path": "B"}}
        given.add_flag("data.y", 2)
        assert given.tree == {"data": {"class_path": "B", "init_args": {"y": 2}}}
        given.add_flag("data", "C")
        given.add_flag("data.z", 3)
        assert given.tree == {"data": {"class_path": "C", "init_args": {"z": 3}}}

    def test_a_section_as_a_flag_changes_what_it_names(self, tmp_path):
        """As in `litgpt pretrain`; the rest of a recipe's section is not set back to the defaults."""
        given = Given({"optimizer": "A"})
        (tmp_path / "recipe").write_text("train: {max_norm: 1.0, max_tokens: 5}\nmodel_config: {n_layer: 2, x: {a: 1}}")
        given.add_recipe(tmp_path / "recipe")
        given.add_flag("train", {"max_tokens": 6})
        given.add_flag("eval", {"interval": 7})
        given.add_flag("model_config.x", {"b": 2})
        given.add_flag("optimizer", {"class_path": "B", "init_args": {"lr": 1}})
        given.add_flag("optimizer", {"class_path": "B", "init_args": {"betas": [0, 0]}})
        assert given.tree == {
            "optimizer": {"class_path": "B", "init_args": {"betas": [0, 0]}},
            "train": {"max_norm": 1.0, "max_tokens": 6},
            "eval": {"interval": 7},
            "model_config": {"n_layer": 2, "x": {"b": 2}},
        }

    def test_numbers(self):
        assert load_value("3e-4") == 3e-4
        assert load_value("[1e-3, 2]") == [1e-3, 2]
        assert list(read_flags(["--a", "-1", "--b=--c"])) == [("a", "-1"), ("b", "--c")]

    @pytest.mark.parametrize("words", [["--seed"], ["--seed", "--resume", "auto"], ["--b", "1", "--seed", "--c=2"]])
    def test_a_flag_without_a_value_is_the_one_that_is_named(self, words):
        with pytest.raises(SettingsError, match="^seed: needs a value, --seed VALUE"):
            list(read_flags(words))


CORPUS = """
from litgpt.data import TextFiles


class Broken(TextFiles):
    def connect(self, **settings):
        raise ValueError("a bug")
"""


def test_a_bug_is_not_caught_and_a_wrong_setting_is_one_line(recipe, tmp_path, capsys, monkeypatch):
    """A ValueError inside a data module is not the user's mistake, although it comes before the first step."""
    (tmp_path / "broken_corpus.py").write_text(CORPUS)
    data = {"class_path": "broken_corpus.Broken", "init_args": {"train_data_path": str(tmp_path)}}
    file = recipe(data=data)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="^a bug$"):
        main(["--config", str(file)])
    assert "error" not in capsys.readouterr().err
    assert main(["--config", str(file), "--train.max_norm", "0"]) == 2
    assert capsys.readouterr().err == "error: train.max_norm: 0 must be a number above 0\n"


def test_a_data_module_named_alone(recipe):
    """LitGPT's, as in its recipes, else this package's; flags behind it are read as its arguments are."""
    types = litgpt_types()

    def data(*flags):
        return read_given(["--config", str(recipe(data="TinyStories")), *flags], Path(), types).tree["data"]

    assert data() == "litgpt.data.TinyStories"
    assert data("--data", "TextCorpus", "--data.source_path", "12") == {
        "class_path": "litgpt_moe_ext.data.TextCorpus",
        "init_args": {"source_path": "12"},
    }


def test_the_corpora_of_a_mixture_named_alone(recipe):
    """They are of this package, also where LitGPT has one of that name."""
    corpora = {"a": "TinyStories", "b": {"class_path": "TextCorpus"}, "c": {"class_path": "mine.Corpus"}}
    file = recipe(data=None)
    flags = ("--data=Mixture", f"--data.corpora={json.dumps(corpora)}")
    found = read_given(["--config", str(file), *flags], Path(), litgpt_types()).tree["data"]["init_args"]["corpora"]
    home = "litgpt_moe_ext.data"
    assert found == {"a": f"{home}.TinyStories", "b": {"class_path": f"{home}.TextCorpus"}, "c": corpora["c"]}


def test_a_class_whose_module_lacks_something_says_what(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--config", str(recipe()), "--data", "needs_more.Corpus"]) == 2
    error = capsys.readouterr().err
    assert "data.class_path: 'needs_more.Corpus' must be the import path of a DataModule" in error
    assert "No module named 'not_installed_here'" in error


MISSPELT = """
from litgpt_moe_ext.training.callback import Callback


class Mine(Callback):
    def on_step_beginn(self, state):
        pass
"""


def test_a_misspelt_event_in_a_module_that_a_recipe_names_is_said(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "misspelt.py").write_text(MISSPELT)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--config", str(recipe()), "--callbacks", "[misspelt.Mine]"]) == 2
    assert "on_step_beginn: no event of training has this name; did you mean on_step_begin?" in capsys.readouterr().err


def test_an_argument_without_a_type_is_named(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "untyped.py").write_text(
        "from litgpt_moe_ext.training.callback import Callback\n\n\n"
        "class Mine(Callback):\n    def __init__(self, loss):\n        self.loss = loss\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    callback = "[{class_path: untyped.Mine, init_args: {loss: 1}}]"
    assert main(["--config", str(recipe()), "--callbacks", callback]) == 2
    assert "callbacks.0.loss: has no type in untyped.Mine" in capsys.readouterr().err


TYPED = """
from __future__ import annotations

from typing import TYPE_CHECKING

from litgpt.data import TextFiles

if TYPE_CHECKING:
    from somewhere import Something


class Corpus(TextFiles):
    def __init__(self, train_data_path: str, option: Something | None = None) -> None:
        super().__init__(train_data_path)
"""


def test_a_class_may_have_types_that_only_type_checkers_import(recipe, tmp_path, capsys, monkeypatch):
    (tmp_path / "typed_corpus.py").write_text(TYPED)
    monkeypatch.syspath_prepend(tmp_path)
    data = {"class_path": "typed_corpus.Corpus", "init_args": {"train_data_path": str(tmp_path)}}
    assert main(["--config", str(recipe(data=data)), "--seed", "x"]) == 2
    assert "error: seed: 'x' must be an integer" in capsys.readouterr().err


def test_help_has_the_fields_of_the_model(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for name in FIELDS:
        assert f"--model_config.{name}\n" in page


def test_commands_of_one_process_know_nothing_of_one_another():
    """Here they share their parsers, a user's scripts need not."""
    recipe = Path(__file__).resolve().parents[2] / "configs" / "moe-200m-tinystories.yaml"
    before = read_settings([], recipe)
    other = ["--data.bpe.special_tokens", "[<a>]", "--data.bpe.vocab_size", "400", "--model_config.n_expert", "4"]
    assert read_settings(other, recipe).data.bpe.special_tokens == ["<a>"]
    after = read_settings([], recipe)
    assert (after.data.bpe, after.model_config, after.train) == (before.data.bpe, before.model_config, before.train)


def test_a_setting_of_the_data_that_is_not_given_has_its_whole_name(tmp_path):
    """By which it can be given; one that the run has as well is the run's."""
    (tmp_path / "recipe.yaml").write_text("data: litgpt_moe_ext.data.PythonStdlib\n")
    given = Given()
    given.add_recipe(tmp_path / "recipe.yaml")
    assert given.whole_name("val_fraction") == "data.val_fraction"
    assert given.whole_name("seed") == "seed"
    given.add_flag("data", "nobody.knows.this")
    assert given.whole_name("val_fraction") == "val_fraction"


def test_names_of_other_trainers_lead_to_settings_that_there_are():
    known = {field.name: field.type for field in dataclasses.fields(Settings)}
    for name in elsewhere._ELSEWHERE.values():
        section, _, setting = name.partition(",")[0].partition(".")
        assert section in known
        if setting and section != "optimizer":
            assert setting in {field.name for field in dataclasses.fields(known[section])}
    assert set(elsewhere._MODELS_ELSEWHERE.values()) <= {field.name for field in dataclasses.fields(Config)}
