"""The command `litgpt-moe`: help without heavy imports, errors in one line, exit statuses."""

import ast
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import yaml

from litgpt_moe_ext.cli.arguments import positional, read_arguments
from litgpt_moe_ext.cli.main import COMMANDS, _find, load, main
from litgpt_moe_ext.cli.output import print_table, write_text
from litgpt_moe_ext.cli.settings import SHORT_FORMS
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.field_types import PositiveInt, UnitInterval
from litgpt_moe_ext.training.settings import Settings, field_table
from tests.runs import ROOT, run_command

HEAVY = {"torch", "lightning", "transformers", "litgpt", "matplotlib", "lm_eval"}


def without_heavy_modules(*commands: list[str], heavy: set[str] = HEAVY) -> str:
    """Return what commands print in a fresh process, which fails if one of them imports something heavy."""
    code = (
        "import sys, contextlib; from litgpt_moe_ext.cli.main import main\n"
        f"for arguments in {list(commands)!r}:\n"
        "    with contextlib.suppress(SystemExit): main(arguments)\n"
        f"heavy = {heavy!r} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    return run_command(sys.executable, "-c", code).stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["model-card", "configs/quickstart.yaml"], ["--help"]])
def test_a_reader_that_has_seen_enough(arguments):
    """As with `| head`."""
    read, write = os.pipe()
    os.close(read)
    code = "from litgpt_moe_ext.cli.main import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (-signal.SIGPIPE, "")


@pytest.mark.parametrize("buffering", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_is_gone_before_the_end(buffering):
    """Of a command that could be in the middle of its work, which ends by itself and without a word."""
    read, write = os.pipe()
    os.close(read)
    code = "import sys; from litgpt_moe_ext.cli.main import main; sys.exit(main())"
    command = [sys.executable, *buffering, "-c", code, "init"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_a_chat_without_standard_input(monkeypatch, capsys):
    """As under a scheduler that closes it."""
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", "x"]) == 2
    assert "error: prompt: must be given, --prompt TEXT" in capsys.readouterr().err


def test_help_names_every_command_and_loads_no_torch():
    shown = without_heavy_modules(["--help"])
    for command in COMMANDS:
        assert command.name in shown
        assert command.summary in shown


def test_help_and_errors_of_commands_load_no_torch():
    calls = [[command.name, "--help"] for command in COMMANDS]
    without_heavy_modules(*calls, ["chat"], ["chat", "x", "--top_k=0"], ["chatt"], ["init"])
    without_heavy_modules(["--help"], heavy=HEAVY | {"jsonargparse"})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_setting_of_a_command_is_explained(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command.name, "--help"])
    assert exit.value.code == 0
    page = capsys.readouterr().out
    for field in dataclasses.fields(load(command)):
        assert field.name in page.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model-card", "nothing.yaml"], "nothing.yaml"),
        (["chat", "x", "--top_k", "0"], "top_k: 0 must be an integer of at least 1"),
        (["chat", "x", "--top-p=2"], "top_p: 2 must be a number above 0 and at most 1"),
        (["chat", "x", "--show_experts=yes"], "show_experts: yes must be true or false"),
        (["chat", "x", "--topk", "1"], "--topk is unknown; did you mean --top_k?"),
        (["chat"], "required: CHECKPOINT_DIR"),
        (["chat", "a", "b"], "'b' is one argument too many"),
        (["experts", "x", "--data", "a", "b", "c"], "--data takes one value: 'a' or 'b'"),
        (["chat", "x", "--layer", "1"], "layer: 1 is for --show_experts, which is not given"),
        (["twin", "quickstart.yaml", "new.yaml", "--granularity", "4"], "granularity: 4 is for an MoE twin; give --n_"),
        (["study", "x", "--report", "--only", "1"], "only: must not be given beside report; leave one of them out"),
        (["experts", "x"], "exactly one must be given"),
        (["benchmark-generation", "x", "--batch_sizes", "1", "0"], "batch_sizes: 0 must be an integer of at least 1"),
        (["schedule", "x", "--compare", "wsd", "wsdd"], "compare: wsdd must be one of cosine"),
        (["chatt"], "'chatt' is not a command of litgpt-moe; did you mean chat?"),
        (["chat", "x", "--top_k", "9" * 20], f"top_k: {'9' * 20} must be an integer of at least 1, and below 2**63"),
        (["doctor", "quickstart.yaml", "--memory", "1e300"], "memory: 1e+300 must be the GiB of a GPU"),
        (["benchmark-generation", "quickstart.yaml", "--batch_sizes", "999999999"], "batch_sizes: 999999999 needs"),
        (["benchmark-generation", "quickstart.yaml", "--device", "abacus"], "device: 'abacus' must be a device"),
        (["benchmark-generation", "quickstart.yaml", "--device", "cuda:99"], "device: 'cuda:99' does not work here"),
        (["benchmark-generation", "quickstart.yaml", "--device", "meta"], "device: 'meta' does not work here"),
        (["schedule", "x", "--compare", "wsdd", "--compare", "wsd"], "compare: wsdd must be one of cosine"),
        (["model-card", "quickstart.yaml", "--devices", ""], "devices: '' must be an integer of at least 1"),
        (["init", "nothing"], "recipe: nothing must be one of code-moe-60m"),
        (["init", "quickstart", "--out", "x"], "--out is unknown; OUT is given by its place, without a name"),
        (["model-card", "quikstart.yaml"], "did you mean quickstart.yaml?"),
        (["doctor", "typo.yaml"], "model_config.n_embed: no setting has this name; did you mean n_embd? (typo.yaml:1)"),
        (["doctor", "extended.yaml"], "model_config.own_sharpness: no setting has this name; if an extension adds it"),
        (["train", "--config", "extended.yaml"], "no setting has this name; if an extension adds it, install the"),
        (["doctor", "extended"], "own_sharpness, which this version does not know; if an extension adds it, install"),
        (["train", "--config", "quikstart"], "(No such file or directory); did you mean quickstart.yaml?"),
        (["train", "--data.help", "TextCorpu"], "--data.help: TextCorpu must be the import path of a class, or one of"),
        (["train", "--data.help"], "--data.help: needs a class"),
        (["train", "--data", "TextCorpu"], "did you mean litgpt_moe_ext.data.TextCorpus?"),
        (
            ["train", "--resume", "nowhere"],
            "resume: 'nowhere' is not a whole checkpoint: there is no such directory; name",
        ),
        (
            ["train", "--resume", "shards"],
            "lit_model.pth is missing, but there is a folder of that name with shards; `fa",
        ),
        (["train", "--initial_checkpoint_dir", "run"], "has no lit_model.pth; did you mean run/final?"),
        (
            ["train", "--initial_checkpoint_dir", "theirs"],
            "has no lit_model.pth; `litgpt-moe import theirs NEW_DIR` makes",
        ),
        (
            ["chat", "shards"],
            "has no lit_model.pth, but there is a folder of that name with shards; `fabric consolidate",
        ),
        (["chat", "zero"], "`python zero/lit_model.pth/zero_to_fp32.py zero/lit_model.pth NEW_DIR` joins DeepSpeed's"),
        (["chat", "theirs"], "and no model_config.yaml; `litgpt-moe import theirs NEW_DIR` makes a checkpoint of"),
        (["model-card", "theirs"], "must have a model_config.yaml; `litgpt-moe import theirs NEW_DIR` makes"),
        (["doctor", "run"], "must have a model_config.yaml; did you mean run/final?"),
        (["export", "run", "new"], "has no model_config.yaml; did you mean run/final?"),
        (["chat", "run"], "has no lit_model.pth and no model_config.yaml; did you mean run/final?"),
        (["compare-runs", "run/final"], "with metrics-wide.csv; did you mean run?"),
        (["train", "--optimizer.help", "AdamW"], "--optimizer.help: no class has settings here"),
        (
            ["init", "quickstart", "/proc/x/y.yaml"],
            "out: '/proc/x/y.yaml' cannot be made: '/proc' takes no new files",
        ),
    ],
)
def test_wrong_settings_are_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("model_name: pythia-14m\n")
    (tmp_path / "typo.yaml").write_text("model_config: {n_embed: 8}\n")
    (tmp_path / "extended.yaml").write_text("model_config: {own_sharpness: 8}\n")
    for folder in ("extended", "run/final", "run/step-00000002", "shards/lit_model.pth", "zero/lit_model.pth"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    for file in ("theirs/config.json", "theirs/model-00001-of-00002.safetensors"):
        (tmp_path / file).touch()
    for file in (
        "zero/model_config.yaml",
        "zero/lit_model.pth/zero_to_fp32.py",
        "run/metrics-wide.csv",
        "run/final/lit_model.pth",
        "run/final/model_config.yaml",
        "shards/model_config.yaml",
    ):
        (tmp_path / file).touch()
    (tmp_path / "extended" / "model_config.yaml").write_text("own_sharpness: 8\n")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """What is there stays as it was."""
    file = tmp_path / "recipe.yaml"
    file.write_text("before")

    def full(self: Path, _content: bytes) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SettingsError, match="recipe.yaml cannot be written .No space left on device.; free some space"):
        write_text(file, "after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_only_a_full_disk_asks_for_space(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"cannot be written \(.*\); name another place$"):
        write_text(tmp_path / "file" / "below", "text")


def test_printed_commands_can_be_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "quickstart", "my recipe.yaml"]) == 0
    output = capsys.readouterr().out
    assert "`litgpt-moe doctor 'my recipe.yaml'`" in output
    assert "  litgpt-moe train --config 'my recipe.yaml'\n" in output


@pytest.mark.parametrize("arguments", [["train"], ["doctor"], ["model-card", "configs/quickstart.yaml"]], ids=str)
def test_switched_off_every_command_says_so(arguments, monkeypatch, capsys):
    monkeypatch.setenv("LITGPT_MOE_EXT_DISABLE", "1")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: LITGPT_MOE_EXT_DISABLE: '1' switches litgpt_moe_ext off; unset")
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", "--help"])


def test_faults_of_the_program_keep_their_traceback(monkeypatch):
    """Only `SettingsError` is the user's fault, not every ValueError or OSError."""
    from litgpt_moe_ext.cli.commands.init import Init

    for error in (ValueError("a bug"), OSError("a full disk"), ImportError("a broken installation")):
        monkeypatch.setattr(Init, "run", lambda self, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            main(["init"])
    monkeypatch.setattr(Init, "run", lambda self: (_ for _ in ()).throw(SettingsError("x: 1 must be 2")))
    assert main(["init"]) == 2
    monkeypatch.setattr(Init, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["init"]) == 130


@dataclasses.dataclass
class Example:
    """Do something.

    Attributes:
        first: A path.
        second: An optional path.
        numbers: Some numbers.
        part: A share of 100 %.
        kind: Which one.
        flag: Whether.
    """

    first: Path
    second: Path | None = positional(None)
    numbers: list[PositiveInt] = dataclasses.field(default_factory=lambda: [1])
    part: UnitInterval | None = 0.5
    kind: Literal["a", "b"] = "a"
    flag: bool = False


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x", Example(Path("x"))),
        ("x y --flag", Example(Path("x"), Path("y"), flag=True)),
        ("x --numbers 1 2 --kind b", Example(Path("x"), numbers=[1, 2], kind="b")),
        ("x --part null --flag=false", Example(Path("x"), part=None)),
        ("x --part 1e-1", Example(Path("x"), part=0.1)),
    ],
)
def test_arguments_become_a_dataclass(line, expected):
    assert read_arguments(Example, "example", line.split()) == expected


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("litgpt-moe 0.")


def test_init_lists_and_writes_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines]
    assert all(line.endswith(".") and not line.endswith("al.") for line in lines), "each with a whole sentence"
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert listed == [recipe.stem for recipe in recipes]
    assert main(["init", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").read_text() == (ROOT / "configs" / "quickstart.yaml").read_text()
    assert main(["init", "quickstart"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["init", "quickstart.yaml", "mine/own.yaml"]) == 0
    assert (tmp_path / "mine" / "own.yaml").is_file()


def test_what_is_written_by_default_is_ignored_by_git():
    defaults = {
        field.default
        for command in COMMANDS
        for field in dataclasses.fields(load(command))
        if field.name.startswith("out")
    }
    paths = {str(path) for path in defaults if isinstance(path, Path)}
    assert paths
    for recipe in (ROOT / "configs").glob("*.yaml"):
        settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        paths.add(settings["out_dir"])
        paths.update(filter(None, [settings["data"]["init_args"].get("data_path")]))
    ignored = subprocess.run(["git", "check-ignore", *sorted(paths)], cwd=ROOT, capture_output=True, text=True).stdout
    assert set(ignored.split()) == paths


# Placeholders, and flags of other programs: data_prep, git, torchrun, uv, sbatch, hf, litgpt evaluate, vllm.
_OTHERS = {
    "NAME", "KEY", "value", "log-to-wandb", "log_to_wandb", "standalone", "nproc_per_node", "master_port", "extra",
    "no-optional-locks", "porcelain", "short",
    "signal", "ntasks", "ntasks-per-node", "include", "repo-type", "local-dir", "tasks", "output", "array", "gres",
    "trust-remote-code", "model-impl", "reinstall-package", "torch-backend", "no-sync",
}  # fmt: skip


def test_flags_that_messages_name_exist():
    """Of a command's own module those of this command or of a recipe, elsewhere those of any command."""
    recipe = set(flags_of_recipes())
    own = {
        command.place.partition(":")[0]: {field.name for field in dataclasses.fields(load(command))}
        for command in COMMANDS
    }
    unknown = []
    for file in sorted((ROOT / "litgpt_moe_ext").rglob("*.py")):
        known = own.get(file.stem, set()) if file.parent.name == "commands" else set().union(*own.values())
        for text in strings_of(file):
            for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*\w)", text):
                section = flag.partition(".")[0]
                free = section in ("data", "optimizer", "model_config") and "." in flag
                name = flag.replace("-", "_")
                if not (free or name in known | recipe or flag in _OTHERS or f"no_{name}" in known):
                    unknown.append(f"{file.relative_to(ROOT)}: --{flag}")
    assert not unknown, "\n".join(unknown)


def flags_of_recipes() -> Iterator[str]:
    for row in field_table(Settings):
        yield row.name
        yield row.name.partition(".")[0]
    yield from ("dense_twin", "config", "resume", "progress", "no_progress", "print_config", "help", "version")
    yield from (short.removeprefix("--").replace("-", "_") for short in SHORT_FORMS)


def strings_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_an_option_that_is_given_twice_has_the_values_of_both():
    given = ["x", "--text", "a", "b", "--text", "c", "--json", "1", "--json", "2"]
    read = read_arguments(load(_find("perplexity")), "perplexity", given)
    assert (read.text, read.json) == ([Path("a"), Path("b"), Path("c")], Path("2"))


def test_a_long_name_leaves_the_numbers_of_a_table_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    print_table("", ("run", "loss", "tokens"), [("a name " * 20, "6.5743", "40,960"), ("b", "inf", "1")])
    first, *_ = [line.split() for line in capsys.readouterr().out.splitlines() if "a name" in line]
    assert first[-2:] == ["6.5743", "40,960"]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_the_number_of_a_process_that_is_none_is_named_before_lightning_reads_it(name, monkeypatch, capsys):
    """As after `export RANK=$SLURM_PROCID` without srun."""
    monkeypatch.setenv(name, "")
    assert main(["model-card", "quickstart"]) == main(["train"]) == 2
    assert capsys.readouterr().err.count(f"error: environment: {name}: '' must be a whole number from 0; `unset") == 2
