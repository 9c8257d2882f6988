"""The command line: short forms, precedence, plain error messages."""

import re
from pathlib import Path

import pytest
import torch

from litgpt_moe_ext.cli.parser_errors import annotation_in, near_name, plain_error, value_in
from litgpt_moe_ext.cli.recipe_files import check_recipe, place_of
from litgpt_moe_ext.cli.train import (
    build_parser,
    main,
    normalize,
    take_nulls,
    take_optimizer_keys,
    with_optimizer_keys,
)
from litgpt_moe_ext.training.checkpoint.resume import find_resume_file

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
        (["--no-progress", "--seed", "1"], ["--config", "default.yaml", "--progress=false", "--seed", "1"]),
        (["--progress", "false"], ["--config", "default.yaml", "--progress=false"]),
        (["--resume", "auto"], ["--config", "default.yaml", "--resume", "auto"]),
    ],
    ids=str,
)
def test_normalize(given, expected):
    assert normalize(given, DEFAULT) == expected


def test_config_without_a_file():
    with pytest.raises(SystemExit, match="--config needs the path of a YAML file"):
        normalize(["--config"], DEFAULT)


def parse(*arguments: str, default: Path):
    return build_parser().parse_args(normalize(arguments, default))


def test_command_line_beats_file_beats_default(recipe):
    file = recipe()
    parsed = parse("--seed", "7", "--train.max_tokens", "999", "--config", str(file), default=DEFAULT)
    assert (parsed.seed, parsed.train.max_tokens) == (7, 999)
    assert parsed.train.micro_batch_size == 2, "from the file"
    assert parsed.num_nodes == 1, "the default"


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", "auto"), ("true", True), ("false", False), ("some/dir", Path("some/dir"))]
)
def test_resume(recipe, given, expected):
    assert parse("--resume", given, default=recipe()).resume == expected


@pytest.mark.parametrize(("given", "expected"), [("auto", "auto"), ("true", True), ("false", False)])
def test_compile(recipe, given, expected):
    assert parse("--compile", given, default=recipe()).compile == expected


def test_print_config(recipe, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--print_config", default=recipe())
    assert exit_.value.code == 0
    assert "mlp_class_name: SharedExpertMoE" in capsys.readouterr().out


def test_plain_error():
    message = """Parser key "model_config":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'NoneType'>, <class 'litgpt.config.Config'>]
  Errors:
    - Expected a <class 'NoneType'>
    - Unrecognized arguments: --n_exprt=4
  Given value type: <class 'jsonargparse._util.NestedArg'>
  Given value: NestedArg(key='n_exprt', val='4')"""
    plain = plain_error(message, lambda path: None, lambda path: None)
    assert plain == 'Parser key "model_config": Unrecognized arguments: --n_exprt=4'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule.name", "cosin"], "schedule.name: 'cosin' must be one of cosine, onecycle, wsd"),
        (["--train.max_tokens=much"], "train.max_tokens: 'much' must be an integer or null"),
        (["--model_config.n_shared_expert", "x"], "model_config.n_shared_expert: 'x' must be an integer or null"),
        (
            ["--model_config.norm_class_name", "x"],
            "model_config.norm_class_name: 'x' must be one of LayerNorm, RMSNorm",
        ),
        (["--precision", "16-true"], "precision: '16-true' must be one of bf16-true, bf16-mixed, 16-mixed, 32-true or"),
        (["--compile", "maybe"], "compile: 'maybe' must be true or false or auto"),
        (["--evaluate.tasks", "a.yaml"], "evaluate.tasks: 'a.yaml' must be a list such as [a, b]"),
        (["--parameter_groups.no_weight_decay", "norms"], "no_weight_decay: 'norms' must be a list with any of norms"),
        (["--train.global_batch_size", "null"], "train.global_batch_size: null must be an integer"),
        (["--data.vocab_size", "x"], "data.vocab_size: 'x' must be an integer"),
        (["--data", "foo"], "Expected a dot import path string: foo"),
        (["--model_config.n_embd", "null"], "model_config.n_embd: null is no value for it"),
        (["--model_config.n_exprt", "null"], "--model_config.n_exprt; did you mean model_config.n_expert?"),
        (["--optimizer", "null"], "optimizer: None must be a name, or class_path and init_args"),
    ],
    ids=str,
)
def test_wrong_values_are_named(recipe, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(recipe()), *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_values_of_a_file_are_named(recipe, capsys):
    for changes, message in (
        ({"schedule": {"name": "cosin"}}, "schedule.name: 'cosin' must be one of cosine"),
        ({"model_config": {"n_layer": "x"}}, "model_config.n_layer: 'x' must be an integer"),
        ({"seed": "x"}, "seed: 'x' must be an integer"),
    ):
        with pytest.raises(SystemExit):
            main(["--config", str(recipe(**changes))])
        assert message in capsys.readouterr().err


def test_null_for_a_field_of_the_model(recipe, capsys):
    """As in a file, and in whatever order the arguments stand."""
    given = ["--model_config.n_shared_expert", "null", "--seed", "1", "--model_config.routed_scaling_factor=2"]
    assert take_nulls([*given, "--model_config.n_query_groups=null"]) == (
        ["--seed", "1", "--model_config.routed_scaling_factor=2"],
        ["n_shared_expert", "n_query_groups"],
    )
    assert main(["--config", str(recipe()), *given, "--print_config"]) == 0
    output = capsys.readouterr().out
    assert "n_shared_expert: null" in output
    assert "n_expert: 8" in output, "from the file"


def test_types_and_values_of_settings(tmp_path):
    from litgpt.args import TrainArgs

    annotations = {"train": TrainArgs | None, "seed": int}
    assert annotation_in(annotations, "seed") is int
    assert annotation_in(annotations, "train.max_tokens") == int | None
    assert annotation_in(annotations, "train.nothing") is None
    (tmp_path / "a.yaml").write_text("seed: 3\ntrain: {max_tokens: 5}\n")
    arguments = ["--config", str(tmp_path / "a.yaml"), "--seed=4"]
    assert value_in(arguments, "seed") == "4"
    assert value_in(arguments, "train.max_tokens") == 5
    assert value_in(arguments, "train.nothing") is None


def test_optimizer_keys():
    given = ["--seed", "1", "--optimizer.init_args.lr", "0.5", "--optimizer.eps=0", "--optimizer.class_path", "a.B"]
    others, keys = take_optimizer_keys(given)
    assert others == ["--seed", "1"]
    assert keys == {"lr": "0.5", "eps": "0", "class_path": "a.B"}
    configured = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "betas": [0.9, 0.95]}}
    assert with_optimizer_keys(configured, keys) == {
        "class_path": "a.B",
        "init_args": {"lr": 0.5, "betas": [0.9, 0.95], "eps": 0},
    }
    whole = take_optimizer_keys(["--optimizer", "{class_path: a.C, init_args: {lr: 2}}", "--optimizer.eps", "1"])[1]
    assert with_optimizer_keys(configured, whole) == {"class_path": "a.C", "init_args": {"lr": 2, "eps": 1}}
    assert with_optimizer_keys("SGD", {"lr": "1e-1"})["class_path"] == "torch.optim.SGD"
    with pytest.raises(SystemExit, match="--optimizer.lr needs a value"):
        take_optimizer_keys(["--optimizer.lr"])


def test_learning_rate_from_the_command_line(recipe, capsys):
    assert main(["--config", str(recipe()), "--optimizer.init_args.lr", "0.125", "--print_config"]) == 0
    assert "lr: 0.125" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it must consist of lines KEY: VALUE"),
        (b"- seed: 1\n", "holds no settings"),
        (b"seed: 1\ntrain: [1, 2\n", "line 3 is not YAML"),
        (b"seed: 1\ntrain:\n  max_tokens: 1\n  max_norm: 2\n  max_tokens: 3\n", "line 5 gives train.max_tokens again"),
        (b"\x9d\xff", "is not a text file"),
        (None, "cannot be read (No such file"),
    ],
    ids=["empty", "list", "syntax", "repeated", "binary", "missing"],
)
def test_files_that_are_no_recipes(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_recipe(file)
    assert str(file) in str(error.value)


def test_a_wrong_file_ends_the_command(tmp_path, capsys):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(tmp_path / "empty.yaml")])
    assert exit_.value.code == 2
    assert f"--config: '{tmp_path / 'empty.yaml'}' is empty" in capsys.readouterr().err


def test_near_names(recipe, capsys):
    for arguments, suggestion in (
        (["--config", str(recipe("a", model_config={"n_exprt": 4}))], "did you mean model_config.n_expert?"),
        (["--config", str(recipe()), "--trian.max_tokens", "3"], "did you mean train.max_tokens?"),
        (["--config", str(recipe("b", trian={"max_tokens": 3}))], "did you mean train.max_tokens?"),
        (["--config", str(recipe("c", train={"lr_warmup_step": 3}))], "did you mean train.lr_warmup_steps?"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert suggestion in capsys.readouterr().err
    assert near_name("Unrecognized arguments: --zzzz", ["train.max_tokens"]) == ""


def test_resume_from_a_run(tmp_path):
    """The directory of a run stands for its newest whole checkpoint."""
    for step in (1, 2):
        directory = tmp_path / f"step-0000000{step}"
        directory.mkdir()
        torch.save({}, directory / "lit_model.pth")
        (directory / "model_config.yaml").write_text("")
    assert find_resume_file(tmp_path, Path("elsewhere")) == tmp_path / "step-00000002" / "lit_model.pth"
    with pytest.raises(FileNotFoundError, match="is not a whole checkpoint"):
        find_resume_file(tmp_path / "nothing", Path("elsewhere"))


def test_only_what_a_file_says_has_a_line(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("optimizer:\n  class_path: SGD\n  init_args:\n    lr: abc\ntrain:\n  max_norm: -1\n")
    error = "train.max_norm: -1 must be above 0"
    assert place_of(error, [file], ["--config", str(file)]) == f" ({file}:6)"
    assert place_of(error, [file], ["--train.max_norm", "-1"]) == ""
    error = "optimizer: {'init_args': {'lr': 'abc'}} cannot be made"
    assert place_of(error, [file], ["--config", str(file)]) == f" ({file}:4)"
    assert place_of(error, [file], ["--optimizer.lr=abc"]) == ""
