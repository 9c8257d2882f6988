"""Whatever writes a checkpoint leaves a whole directory, or none and a line that says why."""

import os
from types import SimpleNamespace

import pytest
from litgpt import Config

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import read_checkpoint
from litgpt_moe_ext.export import directory
from litgpt_moe_ext.export.directory import new_directory
from litgpt_moe_ext.export.formats import export
from litgpt_moe_ext.export.hf.read import import_checkpoint
from litgpt_moe_ext.export.llama_moe import convert_checkpoint
from litgpt_moe_ext.export.upcycling import upcycle
from tests.export.hf.models import DENSE, MOE_OF_LITGPT, SOFTMAX, make_checkpoint
from tests.runs import small_disk

_OF_LITGPT = {**MOE_OF_LITGPT, "router_score_function": "softmax"}
_OF_DENSE = {**SOFTMAX, "moe_intermediate_size": DENSE["intermediate_size"]}
WRITERS = {
    "hf": (SOFTMAX, lambda source, out: export(source, out, "hf")),
    "gguf": (SOFTMAX, lambda source, out: export(source, out, "gguf")),
    "import": (SOFTMAX, import_checkpoint),
    "convert-experts": (_OF_LITGPT, convert_checkpoint),
    "upcycle": (DENSE, lambda source, out: upcycle(source, out, Config(**_OF_DENSE))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk(tmp_path, name):
    settings, write = WRITERS[name]
    source = tmp_path / "source"
    make_checkpoint(source, settings, False)
    if name == "import":
        export(source, tmp_path / "hf", "hf")
        source = tmp_path / "hf"
    there = set(tmp_path.rglob("*"))
    nothing_left = "out_dir: .* could not be written .*, and nothing is left of it; free"
    with small_disk(20_000), pytest.raises(SettingsError, match=nothing_left):
        write(source, tmp_path / "some" / "folder" / "out")
    assert set(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "import"])
def test_weights_with_a_flipped_bit(tmp_path, name):
    """Whatever is made of them has no checksums that could tell."""
    settings, write = WRITERS[name]
    make_checkpoint(tmp_path / "source", settings, False)
    weights = bytearray((tmp_path / "source" / "lit_model.pth").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "source" / "lit_model.pth").write_bytes(weights)
    with pytest.raises(SettingsError, match=r"_dir: in '.*source' lit_model.pth is damaged in .*; copy it"):
        write(tmp_path / "source", tmp_path / "out")
    assert names(tmp_path) == ["source", "source/lit_model.pth", "source/model_config.yaml"]


def test_names_that_cannot_be(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    too_long = "cannot be made .*File name too long"
    for name, reason in (("link", "exists; name a new"), ("x" * 300, too_long), ("folder/" + "x" * 300, too_long)):
        with pytest.raises(SettingsError, match=f"out_dir: .* {reason}"), new_directory(tmp_path / name):
            raise AssertionError("nothing should be written")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_is_there_is_not_said_to_be_gone(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(directory, "flush", denied)
    with pytest.raises(PermissionError), new_directory(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert (tmp_path / "out" / "file").is_file()


def test_faults_of_the_program_stay_what_they_are(tmp_path):
    for fault in (RuntimeError("shapes"), ValueError("number")):
        with pytest.raises(type(fault)) as found, new_directory(tmp_path / "some" / "out"):
            raise fault
        assert found.value is fault
    assert not list(tmp_path.iterdir())


def test_weights_that_may_not_be_read(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "source", SOFTMAX, False)

    def denied(*_arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(SettingsError, match="checkpoint_dir: .*lit_model.pth cannot be read .Permission denied"):
        read_checkpoint(tmp_path / "source" / "lit_model.pth")


def test_what_another_process_made_meanwhile_stays(tmp_path):
    out_dir = tmp_path / "out"

    def write():
        with new_directory(out_dir) as partial:
            (partial / "late").touch()
            out_dir.mkdir()
            (out_dir / "first").touch()

    with pytest.raises(SettingsError, match="exists; name a new directory"):
        write()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/first"]


def test_two_at_once(tmp_path):
    """The second is refused before it works, and neither takes anything from the first."""
    out_dir = tmp_path / "some" / "out"
    with new_directory(out_dir) as partial:
        (partial / "file").touch()
        message = f"out_dir: '{out_dir}' is being made by process {os.getpid()} on .*; wait until it ends"
        with pytest.raises(SettingsError, match=message), new_directory(out_dir):
            raise AssertionError("nothing should be written")
        with new_directory(out_dir.with_name("other")):
            pass
    assert names(tmp_path) == ["some", "some/other", "some/out", "some/out/file"]


# A forked process can end in the middle without cleaning up, as a killed one does.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked on Windows")
def test_what_a_killed_process_left(tmp_path, monkeypatch):
    """It vanishes before the space is counted, which it takes."""
    out_dir = tmp_path / "out"
    if not (pid := os.fork()):
        try:
            with new_directory(out_dir) as partial:
                (partial / "half").touch()
                os._exit(9)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert names(tmp_path) == [".out.lock", ".out.lock.owner", ".out.partial", ".out.partial/half"]

    def free(_folder):
        return SimpleNamespace(free=0 if (tmp_path / ".out.partial").exists() else 1)

    monkeypatch.setattr("shutil.disk_usage", free)
    with (
        pytest.raises(SettingsError, match="needs 2e-09 GB, but its disk has 1e-09 GB left"),
        new_directory(out_dir, 2),
    ):
        pass
    with new_directory(out_dir, 1) as partial:
        (partial / "whole").touch()
    assert names(tmp_path) == ["out", "out/whole"]


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
