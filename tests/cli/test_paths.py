"""Paths that cannot be looked up: a name that is too long, a folder that may not be entered, a link to itself."""

import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_type_hints

import pytest

from litgpt_moe_ext.cli import train
from litgpt_moe_ext.cli.arguments import build_parser
from litgpt_moe_ext.cli.main import COMMANDS, load, main
from litgpt_moe_ext.cli.output import write_text
from litgpt_moe_ext.cli.paths import check_path, check_paths
from litgpt_moe_ext.data.pipeline.store.unfinished import only_one
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.phases.inputs import check_initial_checkpoint, check_writable
from tests.runs import ROOT

CONFIGS = ROOT / "configs"
TOO_LONG = "a" * 300


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_path_of_a_command_is_looked_up(command, capsys):
    kind = load(command)
    parser, hints = build_parser(kind, command.name), get_type_hints(kind)
    paths = [field.name for field in dataclasses.fields(kind) if "Path" in str(hints[field.name])]
    assert paths
    actions = {action.dest: action for action in parser._actions}
    places = [field.name for field in dataclasses.fields(kind) if not actions[field.name].option_strings]
    for wrong in paths:
        given = [TOO_LONG if name == wrong else "quickstart" for name in places]
        required = [name for name, action in actions.items() if action.required and action.option_strings]
        for name in {*required, *({wrong} - {*places})}:
            given += [f"--{name}", TOO_LONG if name == wrong else "1"]
        assert main([command.name, *given]) == 2
        assert f"error: {wrong}: '{TOO_LONG}' cannot be looked up (File name too long)" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config", "--out_dir", "--tokenizer_dir", "--data.source_path", "--resume"])
def test_paths_of_a_training(flag, tmp_path, capsys):
    given = ["--config", str(CONFIGS / "quickstart.yaml"), "--out_dir", str(tmp_path / "out"), flag, TOO_LONG]
    assert train.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flag if flag == '--config' else flag[2:]}: '{TOO_LONG}' cannot be ")
    assert "(File name too long)" in error


@pytest.mark.parametrize("flag", ["out_dir", "data.source_path", "data.data_path", "resume"])
def test_no_folder_is_called_like_a_home(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config", str(CONFIGS / "quickstart.yaml"), f"--{flag}", "~/mine"]) == 2
    assert f"error: {flag}: '~/mine' begins with ~, which only shells replace" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["out_dir", "data.source_path", "data.data_path", "resume"])
@pytest.mark.parametrize("variable", ["$SCRATCH", "${SCRATCH}"])
def test_no_folder_is_called_like_a_variable(flag, variable, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    path = f"runs/{variable}/mine"
    assert train.main(["--config", str(CONFIGS / "quickstart.yaml"), f"--{flag}", path]) == 2
    assert f"error: {flag}: '{path}' has {variable}, which only shells replace" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_may_be_called_like_a_variable(tmp_path):
    (tmp_path / "$HOME").write_text("text")
    check_path("text", tmp_path / "$HOME")


WITHOUT_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}


def refused_without_utf8(*words: str | Path) -> str:
    """Return the one line with which a program ends in a locale that has no letters but ASCII."""
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | WITHOUT_UTF8, capture_output=True)
    (line,) = ended.stderr.decode().splitlines()
    assert ended.returncode == 2
    return line


# Windows and macOS keep names as Unicode, so there Python meets none that it cannot decode, or encode.
names_are_bytes = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are Unicode")


@pytest.mark.slow
@names_are_bytes
@pytest.mark.parametrize(
    ("letters", "remedy"),
    [(b"d\xc3\xbc", "; set PYTHONUTF8=1"), (b"d\xfc", "; write, or rename, it in UTF-8")],
    ids=["utf8", "latin1"],
)
def test_letters_that_python_does_not_decode(letters, remedy, finished, tmp_path):
    """In a locale without them, where UTF-8 mode is off; and in names that are of another encoding anyway."""
    name = os.fsdecode(letters)
    finished(tmp_path / name)
    for setting, words in (
        ("out_dir", ("run_train.py", "--out_dir", tmp_path / name)),
        ("sample.prompts", ("run_train.py", f"--sample.prompts=['{name}']")),
        ("source_path", ("data_prep/text_folder.py", "--bpe.vocab_size", "300", "--source_path", tmp_path / name)),
        ("checkpoint_dir", ("-m", "litgpt_moe_ext", "perplexity", tmp_path / name / "final", "--text", "README.md")),
    ):
        line = refused_without_utf8(*words)
        assert line.startswith(f"error: {setting}: ")
        assert line.endswith(remedy)


@pytest.mark.slow
@names_are_bytes
def test_letters_of_a_recipe_that_no_file_can_have(tmp_path):
    (tmp_path / "recipe.yaml").write_text("out_dir: dü\n", encoding="utf-8")
    line = refused_without_utf8("run_train.py", "--config", tmp_path / "recipe.yaml")
    assert line.startswith("error: out_dir: 'd\\xfc' cannot be looked up ('ascii' codec can't encode character")
    assert "; set PYTHONUTF8=1, or name another path (" in line


def test_what_may_not_be_entered_and_what_is_no_name(tmp_path, monkeypatch):
    def refuse(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(SettingsError, match=r"data.path: 'a\\x00b' cannot be looked up \(.*embedded null"):
        check_paths({"data": {"class_path": "C", "init_args": {"path": Path("a\0b")}}})
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SettingsError, match="too many levels|Too many levels"):
        check_paths({"files": [Path("nothing"), tmp_path / "loop"]})
    check_path("file", tmp_path / "nothing")
    (tmp_path / "file").touch()
    check_path("file", tmp_path / "file" / "below")
    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(SettingsError, match=r"file: 'x' cannot be looked up \(Permission denied\); name another path"):
        check_path("file", Path("x"))


def test_results_have_a_place_before_the_work_begins(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for name, place, problem in (
        ("json", tmp_path, "is a folder; name a file"),
        ("json", tmp_path / "file" / "x", f"cannot be made, because '{tmp_path / 'file'}' is a file"),
        ("out_dir", tmp_path / "file" / "new" / "x", f"cannot be made, because '{tmp_path / 'file'}' is a file"),
    ):
        with pytest.raises(SettingsError, match=f"{name}: '{place}' {problem}"):
            check_path(name, place)
    check_path("out_dir", tmp_path)
    assert main(["perplexity", "nothing", "--text", "nothing", "--json", str(tmp_path)]) == 2
    assert "error: json: " in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SettingsError, match=f"out_dir: '.*x/y' cannot be written \\('{tmp_path}' is read-only for you"):
        check_path("out_dir", tmp_path / "x" / "y")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["init", "quickstart"]) == 2  # into the working directory, which nobody has named
    message = "out: 'quickstart.yaml' cannot be written ('.' is read-only for you); name another path"
    assert capsys.readouterr().err == f"error: {message}\n"
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(SettingsError, match=f"text: '{place}' cannot be read \\(Permission denied\\)"):
            check_path("text", place)
        with pytest.raises(SettingsError, match=f"data.source_path: '{place}' cannot be read"):
            check_paths({"out_dir": place, "data": {"init_args": {"data_path": place, "source_path": place}}})
    (tmp_path / "lit_model.pth").touch()
    with pytest.raises(SettingsError, match="initial_checkpoint_dir: '.*lit_model.pth' cannot be read"):
        check_initial_checkpoint(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc, which takes no files, from root either")
@pytest.mark.parametrize("place", ["/proc/nothing/x", "/proc"])
def test_a_file_system_that_takes_no_files_is_no_place(place):
    """Not even from root, whom `os.access` would let write there."""
    for name in ("out_dir", "json"):
        path = place if name == "out_dir" else f"{place}/y"
        with pytest.raises(
            SettingsError, match=f"^{name}: '{path}' cannot be (made: '/proc' takes|written \\('/proc')"
        ):
            check_path(name, Path(path))
    with pytest.raises(SettingsError, match=f"^out_dir: '{place}' must be a directory in which files can be created"):
        check_writable(Path(place))
    with pytest.raises(SettingsError, match=f"^data_path: '{place}' cannot be used as a cache folder"):
        only_one(Path(place) / "0123", verbose=False).__enter__()


def test_a_link_to_a_disk_that_is_gone_is_named(tmp_path, monkeypatch):
    """Of which the system says only that it exists."""
    monkeypatch.chdir(tmp_path)
    Path("scratch").symlink_to("gone")
    with pytest.raises(
        SettingsError, match="^json: 'scratch/a' cannot be made, because 'scratch' is a link to what is"
    ):
        check_path("json", Path("scratch/a"))
    cause = "'scratch' is a link to 'gone', which is not there"
    for place in ("scratch", "scratch/run"):
        with pytest.raises(SettingsError, match=f"^out_dir: '{place}' must be a directory .* \\({cause}\\); choose"):
            check_writable(Path(place))
    with pytest.raises(
        SettingsError, match=f"^data_path: 'scratch' cannot be used as a cache folder \\({cause}\\); set"
    ):
        only_one(Path("scratch/0123"), verbose=False).__enter__()


def test_a_file_system_without_locks_is_no_place(tmp_path, monkeypatch):
    """As NFS without its daemon; a run would end after its processes have met, or take it for one in use."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SettingsError, match=r"^out_dir: '.*' must be .* and locked \(No locks available\); choose"):
        check_writable(tmp_path / "run")
    with pytest.raises(SettingsError, match=r"^data_path: '.*' .*\(No locks available\); set data_path to .* lock"):
        only_one(tmp_path / "data" / "0123", verbose=False).__enter__()
    assert not [*(tmp_path / "run").iterdir()]


@pytest.mark.parametrize("arguments", [["doctor"], ["model-card"], ["twin", "out.yaml"], ["study"], ["schedule"]])
def test_a_recipe_that_cannot_be_read_or_is_empty(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, *others = arguments
    name = "study" if command == "study" else "recipe"
    Path("empty.yaml").touch()
    assert main([command, "empty.yaml", *others]) == 2
    assert capsys.readouterr().err == (
        f"error: {name}: 'empty.yaml' is empty; it must consist of lines KEY: VALUE, as in configs/\n"
    )

    def refuse(self, *args, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert main([command, "empty.yaml", *others]) == 2
    assert f"error: {name}: 'empty.yaml' cannot be read (Permission denied); name a" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a named pipe has no path in a folder on Windows")
def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    """As /dev/stdout and /dev/null, which root could replace by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_path("json", pipe)
    write_text(pipe, "content")
    assert os.read(reader, 100) == b"content"
    assert pipe.is_fifo()
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files have paths in /proc on Linux only")
@pytest.mark.parametrize("name", ["/proc/self/fd/1", "/dev/fd/1", "link"])
def test_standard_output_that_goes_to_a_file(name, tmp_path):
    """As /dev/stdout, which is such a link: it has what is printed before and after."""
    path = tmp_path / name
    if name == "link":
        path.symlink_to("/proc/self/fd/1")
    code = (
        "from pathlib import Path; from litgpt_moe_ext.cli.output import write_text; print('a'); "
        f"write_text(Path('{path}'), 'b\\n'); print('c')"
    )
    with open(tmp_path / "out", "ab") as output:
        subprocess.run([sys.executable, "-c", code], stdout=output, check=True)
    assert (tmp_path / "out").read_text() == "a\nb\nc\n"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="only Linux keeps files in /dev/shm")
def test_a_file_in_memory_is_replaced():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for content in ("first", "second"):
            write_text(Path(folder) / "file", content)
            assert (Path(folder) / "file").read_text() == content


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    for content in ("first", "second"):
        write_text(tmp_path / "link", content)
        assert (tmp_path / "there" / "file").read_text() == content
    assert (tmp_path / "link").is_symlink()
