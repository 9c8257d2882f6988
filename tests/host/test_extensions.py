"""Installed extensions, which an entry point names, may import all of LitGPT wherever something imports it first."""

import os
import sys

import pytest

from litgpt_moe_ext import extend
from litgpt_moe_ext.cli.train import print_help
from litgpt_moe_ext.config.fields import FIELDS, Field
from litgpt_moe_ext.field_types import PositiveFloat
from litgpt_moe_ext.moe.kernels import registry
from tests.runs import ROOT, run_command


@pytest.fixture
def installed(tmp_path):
    """Return a function that installs a module with some first lines as an extension, and returns its path."""

    def install(first_lines: str) -> str:
        info = tmp_path / "probe-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probe\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[litgpt_moe_ext.extensions]\nprobe = probe_extension:register\n")
        (tmp_path / "probe_extension.py").write_text(f"{first_lines}\ndef register():\n    print('registered')\n")
        return os.pathsep.join([str(tmp_path), str(ROOT)])

    return install


@pytest.mark.parametrize(
    ("first_lines", "code"),
    [
        pytest.param("from litgpt import GPT", "import litgpt.__main__", id="as in litgpt's commands"),
        pytest.param(
            "from litgpt import LLM", "import litgpt.config", id="as in commands that describe", marks=pytest.mark.slow
        ),
        pytest.param("import litgpt.pretrain", "from litgpt import Config", id="the loop", marks=pytest.mark.slow),
        pytest.param(
            "import litgpt.model",
            "import probe_extension, litgpt_moe_ext; litgpt_moe_ext.register()",
            id="by a script that imports it first",
            marks=pytest.mark.slow,
        ),
        pytest.param("", "import litgpt.config, litgpt.__main__; litgpt.LLM", id="once", marks=pytest.mark.slow),
    ],
)
def test_an_extension_may_import_litgpt(installed, first_lines, code):
    ended = run_command(sys.executable, "-c", code, PYTHONPATH=installed(first_lines))
    assert (ended.stdout, ended.stderr) == ("registered\n", "")


def test_help_lists_the_settings_of_an_extension(monkeypatch, capsys):
    field = Field(PositiveFloat, "sharpness of one's own", ("feed_forward", "moe"))
    entry_point = type("EntryPoint", (), {"name": "own", "value": "own:register"})()
    entry_point.load = lambda: lambda: monkeypatch.setitem(FIELDS, "router_own_sharpness", field)
    monkeypatch.setattr(extend, "entry_points", lambda group: [entry_point])
    monkeypatch.setattr(extend, "_called", set())
    print_help()
    assert "--model_config.router_own_sharpness\n      sharpness of one's own\n" in capsys.readouterr().out


def test_all_that_registers_is_in_one_place():
    """Without torch, which only expert backends need."""
    names = "register_router, register_loss, register_activation, register_kernel, Field, RouterType, AttentionKernel"
    code = f"from litgpt_moe_ext.extend import {names}; import sys; assert 'torch' not in sys.modules"
    assert run_command(sys.executable, "-c", code).stderr == ""
    from litgpt_moe_ext.extend import ExpertBackend, Preference, register_backend

    assert (ExpertBackend, Preference, register_backend) == (
        registry.ExpertBackend,
        registry.Preference,
        registry.register_backend,
    )
    assert all(hasattr(extend, name) for name in extend.__all__)
    assert not hasattr(extend, "register_bakend")
