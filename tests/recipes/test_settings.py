"""What recipes say: every key reaches something and is explained, figures and commands in the headers are true."""

import inspect
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import yaml
from litgpt.pretrain import validate_args

from litgpt_moe_ext import data as data_modules
from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.optim.schedules import Schedule
from litgpt_moe_ext.training.phases.checks import check_batch
from tests.recipes.costs import costs, flops_per_token, parameters_line, size_of
from tests.recipes.files import RECIPES, ROOT, commands, header, path_of, values_of
from tests.settings import read_settings

every_recipe = pytest.mark.parametrize("recipe", RECIPES)
KEY = re.compile(r"( *)(\w+):( |$)")


def content_of(recipe: str) -> dict:
    return yaml.safe_load(path_of(recipe).read_text(encoding="utf-8"))


@every_recipe
def test_every_key_reaches_what_it_feeds(recipe):
    """Each value in the file is found again in the object that is made of its section."""
    parsed = values_of(recipe)
    for section, given in content_of(recipe).items():
        built = parsed[section]
        if section == "optimizer":
            name = given["class_path"].rpartition(".")[2]
            accepted = inspect.signature(getattr(torch.optim, name)).parameters
            assert set(given["init_args"]) <= set(accepted)
            assert built["init_args"] == given["init_args"]
        elif isinstance(given, dict):
            known = {field.name for field in fields(built)}
            given = given.get("init_args", given)
            assert set(given) <= known
            for key, value in given.items():
                assert plain(getattr(built, key)) == value, f"{section}.{key}"
        else:
            assert plain(built) == given, section
    validate_args(parsed["train"].for_litgpt(), parsed["eval"].for_litgpt(), None, False)
    assert (parsed["train"].max_seq_length or 1) <= parsed["model_config"].block_size


def plain(value):
    """Return a parsed value as YAML has it; of dataclasses what is not the default."""
    if hasattr(value, "__dataclass_fields__"):
        given = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {f.name: given[f.name] for f in fields(value) if given[f.name] != plain(f.default)}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str, dict)) else str(value)


@pytest.mark.parametrize(
    ("recipe", "right", "wrong", "message"),
    [
        ("code-moe-60m", "  moe_intermediate_size: ", "  moe_intermediate_sizes: ", "moe_intermediate_sizes"),
        (
            "gpt-moe-fineweb",
            "class_path: litgpt_moe_ext.data.TokenShards",
            "class_path: litgpt_moe_ext.data.TokenShard",
            "TokenShard",
        ),
        ("nanogpt-tinystories", "      special_tokens: ", "      special_token: ", "special_token"),
        ("moe-200m-tinystories", "    betas: ", "    beta: ", "beta"),
        ("moe-200m-tinystories", "    separator: ", "    seperator: ", "seperator"),
        ("nanogpt-moe-tinystories", "  save_interval: 1000", "  save_interval: often", "save_interval"),
        ("code-moe-800m", "  global_batch_size: 128", "  global_batch_size: 127", "is not a multiple"),
    ],
)
def test_a_broken_recipe_is_refused_with_file_and_line(tmp_path, capsys, recipe, right, wrong, message):
    """A misspelt key, class, tokenizer field, argument of the optimizer, argument of the data module; a wrong value."""
    text = path_of(recipe).read_text(encoding="utf-8")
    assert text.count(right) == 1
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    line = text[: text.index(right)].count("\n") + 1
    assert main(["--config", str(file), "--out_dir", str(tmp_path / "out"), "--devices", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"{file}:{line}" in error, error


def test_a_misspelt_key_is_refused_in_every_section(tmp_path, capsys):
    text = path_of("gpt-moe-fineweb").read_text(encoding="utf-8")
    sections = [name for name, given in yaml.safe_load(text).items() if isinstance(given, dict)]
    assert len(sections) >= 8
    for section in sections:
        content = yaml.safe_load(text)
        target = content[section].get("init_args", content[section])
        target["misspelt"] = target.pop(next(iter(target)))
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        if section == "optimizer":  # a dictionary to the parser
            assert main(["--config", str(file), "--out_dir", str(tmp_path)]) == 2
            assert "misspelt" in capsys.readouterr().err
        else:
            with pytest.raises(SettingsError) as error:
                read_settings(["--config", str(file)])
            assert "misspelt: no setting has this name" in str(error.value), section


def explained_in(recipe):
    """Return the keys of a recipe that have a comment, or stand in a group that has one."""
    keys, previous, found = set(), "", False
    for line in path_of(recipe).read_text(encoding="utf-8").splitlines():
        if match := KEY.match(line):
            in_group = found and (before := KEY.match(previous)) and before[1] == match[1]
            found = bool(previous.lstrip().startswith("#") or in_group)
            keys |= {match[2]} if found else set()
        previous = line if line.strip() else ""
    return keys


@pytest.mark.parametrize("recipe", [*RECIPES, "quickstart"])
def test_every_key_is_explained(recipe):
    """A comment stands above every key, or above its group, here or in the reference; class_path needs none."""
    previous, reference = "", set() if recipe == "quickstart" else explained_in("quickstart")
    for number, line in enumerate(path_of(recipe).read_text(encoding="utf-8").splitlines(), 1):
        if match := KEY.match(line):
            explained = previous.lstrip().startswith("#") or KEY.match(previous) and KEY.match(previous)[1] == match[1]
            needs_none = match[2] in ("class_path", "init_args") or match[2] in reference
            assert explained or needs_none, f"{recipe}:{number} {line}"
        previous = line if line.strip() else ""


@every_recipe
def test_parameters_and_time_of_the_header(recipe):
    parsed = values_of(recipe)
    assert parameters_line(size_of(parsed)) in header(recipe)
    text = "\n".join(header(recipe))
    assert f"{flops_per_token(parsed) / 1e9:.2f} GFLOP a token" in text
    hours = float(re.search(r"Time: ([\d.]+) hours", text)[1])
    expected = flops_per_token(parsed) * parsed["train"].max_tokens / (0.3 * 312e12) / 3600
    assert hours == pytest.approx(expected, abs=0.05)
    assert commands(recipe, "python -m tests.recipes.costs") == [[f"configs/{recipe}.yaml"]]


@pytest.mark.slow
@every_recipe
def test_memory_of_the_header(recipe):
    found = costs(values_of(recipe))
    assert found.time_line() in header(recipe)
    (line,) = (line for line in header(recipe) if line.startswith("Memory of a GPU"))
    stated = [float(number) for number in re.findall(r"\d+\.\d", line)]
    assert stated[1] == pytest.approx(found.state_bytes / 1e9, abs=0.051)
    # What is kept depends a little on the kernels of the CPU.
    assert stated[2] == pytest.approx(found.activation_bytes / 1e9, rel=0.1, abs=0.06)
    assert stated[0] == pytest.approx(stated[1] + stated[2], abs=0.11)


@pytest.mark.parametrize(
    "recipe", ["moe-200m-tinystories", "code-moe-800m", "nanogpt-moe-tinystories", "nanogpt-tinystories"]
)
def test_the_replaced_systems_are_a_flag_away(recipe):
    """The header says how the recipe differs, and its command gives a model of the size it names."""
    (start,) = (number for number, line in enumerate(header(recipe)) if line.startswith("Unlike "))
    (total,) = re.findall(r"[\d,]{9,}(?= parameters)", " ".join(header(recipe)[start : start + 2]))
    given = [*commands(recipe, "python run_train.py"), *commands(recipe, "torchrun")]
    flags = [words[words.index("--config") + 2 :] for words in given]
    (changes,) = (
        words
        for words in flags
        if any(word.startswith("--model_config.") for word in words) and "--model_config.intermediate_size" not in words
    )
    assert f"{size_of(values_of(recipe, *changes)).total:,}" == total


@pytest.mark.slow
def test_the_advice_for_6_gb_leaves_a_gigabyte_free():
    (advice,) = (c for c in commands("moe-200m-tinystories", "python run_train.py") if "--fused_cross_entropy" in c)
    assert costs(values_of("moe-200m-tinystories", *advice[2:])).gigabytes < 5


@every_recipe
def test_commands_of_the_header_are_understood(recipe):
    """Training accepts the arguments, with any launcher; what reads checkpoints looks where the recipe puts them."""
    content = content_of(recipe)
    named = f"configs/{recipe}.yaml"
    training = [*commands(recipe, "python run_train.py"), *commands(recipe, "torchrun")]
    assert len(training) >= 3
    for arguments in training:
        arguments = arguments[arguments.index("--config") :]
        assert arguments[1] == named
        values_of(recipe, *arguments[2:])
    for program in ("litgpt generate", "litgpt evaluate"):
        (arguments,) = commands(recipe, program)
        assert arguments[0] in (f"{content['out_dir']}/final", f"{content['out_dir']}/best")
    assert commands(recipe, "litgpt generate")[0][2] in [*content["sample"]["prompts"]]


def test_the_twin_costs_what_the_moe_costs():
    dense, moe = (size_of(values_of(f"gpt-{kind}-fineweb")) for kind in ("dense", "moe"))
    assert moe.active == pytest.approx(dense.active, rel=1e-3)
    assert moe.total > 2 * dense.total
    twin = values_of("nanogpt-tinystories", "--model_config.intermediate_size", "2048")
    assert size_of(twin).active == pytest.approx(size_of(values_of("nanogpt-moe-tinystories")).active, rel=1e-2)
    dense, moe = (values_of(f"gpt-{kind}-fineweb") for kind in ("dense", "moe"))
    for key in ("train", "eval", "data", "optimizer", "schedule", "parameter_groups", "precision", "seed"):
        assert plain(dense[key]) == plain(moe[key]), key


@pytest.mark.parametrize(("devices", "num_nodes", "accumulation"), [(1, 1, 32), (8, 1, 4), (8, 4, 1)])
def test_only_accumulation_follows_from_the_number_of_processes(devices, num_nodes, accumulation):
    """gpt-moe-fineweb: 524,288 tokens a step and 19,073 steps, whoever computes them."""
    parsed = values_of("gpt-moe-fineweb", "--devices", str(devices), "--num_nodes", str(num_nodes))
    train, processes = parsed["train"], devices * num_nodes
    check_batch(train.global_batch_size, train.micro_batch_size, processes)
    assert train.for_litgpt().gradient_accumulation_iters(devices, num_nodes) == accumulation
    tokens = accumulation * train.micro_batch_size * processes * parsed["model_config"].block_size
    assert tokens == 524_288
    assert divmod(train.max_tokens, tokens) == (19_073, 0)
    changed = {name for name, value in values_of("gpt-moe-fineweb").items() if plain(parsed[name]) != plain(value)}
    assert changed <= {"devices", "num_nodes"}


def test_a_number_of_processes_that_leaves_a_rest_is_refused():
    train = values_of("gpt-moe-fineweb")["train"]
    with pytest.raises(
        ValueError, match=r"global_batch_size: 512 is not a multiple .* \(16\) .* \(6\); .* 480 or 576$"
    ):
        check_batch(train.global_batch_size, train.micro_batch_size, processes=6)
    with pytest.raises(ValueError, match=r"nearest that are: 16, or set train.micro_batch_size to 6$"):
        check_batch(12, 8, processes=2)


def test_learning_rate_of_fineweb():
    parsed = values_of("gpt-moe-fineweb")
    train = parsed["train"]
    schedule = Schedule(
        parsed["schedule"], parsed["optimizer"]["init_args"]["lr"], train.min_lr, train.lr_warmup_steps, 19_073
    )
    assert schedule.rate(0) == pytest.approx(6e-4 / 715)
    assert schedule.rate(714) == pytest.approx(6e-4)
    assert schedule.rate(19_073) == pytest.approx(6e-5)


@every_recipe
def test_preparation_of_the_header_is_that_of_the_recipe(recipe):
    """The settings that a data_prep command gives are those of the recipe's data module, so that training finds it."""
    data = content_of(recipe)["data"]
    if data["class_path"].endswith("TokenShards"):
        pytest.skip("reads what somebody else prepared")
    script, *arguments = commands(recipe, "python")[0]
    assert script.startswith("data_prep/")
    given = flat(data["init_args"])
    for name in ("packing", "seed", "pattern"):
        given.pop(name, None)
    options = dict(zip(arguments[::2], (yaml.safe_load(value) for value in arguments[1::2]), strict=True))
    defaults = defaults_of(script)
    for name, value in options.items():
        assert given[name.removeprefix("--")] == value
    for name in set(given) - {name.removeprefix("--") for name in options}:
        assert given[name] == defaults[name], f"{name} is missing in the command"


def flat(settings: dict, prefix: str = "") -> dict:
    """Return nested settings under dotted names."""
    result = {}
    for name, value in settings.items():
        result.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return result


def defaults_of(script: str) -> dict:
    (name,) = runpy.run_path(str(ROOT / script))["main"].args
    return {field.name: plain(field.default) for field in fields(getattr(data_modules, name))}


@pytest.mark.slow
def test_hub_commands_are_understood():
    """`hf` accepts the options; nothing is downloaded."""
    parsed = "\n".join(" ".join(arguments) for recipe in RECIPES for arguments in commands(recipe, "hf download"))
    options = set(re.findall(r"--[\w-]+", parsed))
    hf = os.path.join(os.path.dirname(sys.executable), "hf")
    text = subprocess.run([hf, "download", "--help"], capture_output=True, text=True, check=True).stdout
    assert options <= set(re.findall(r"--[\w-]+", text))
