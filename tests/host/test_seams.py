"""The table of seams: complete, true, and clear about what is missing."""

import ast
import importlib
import json
import re
import sys
import types
from pathlib import Path

import litgpt.model
import litgpt.pretrain
import pytest

import litgpt_moe_ext
from litgpt_moe_ext.host import registration
from litgpt_moe_ext.host.lazy_imports import data_modules, modules, packages
from litgpt_moe_ext.host.seams import SEAMS, Seam, table
from litgpt_moe_ext.meta import registrations
from litgpt_moe_ext.training import loop
from tests.host.test_guest_rule import HERE, run
from tests.runs import ROOT


def test_every_change_is_listed_and_made():
    """What registering changes in LitGPT, litdata, lightning and torch is what the table says."""
    result = run([str(HERE / "host" / "changes_report.py")])
    assert result.returncode == 0, result.stderr
    changed = set(json.loads(result.stdout.rpartition("REPORT")[2]))
    # The dataclass and its subclasses are built anew with more fields, and their methods with them.
    config = {name for name in changed if re.match(r"litgpt\.\w+\.Config\.", name)}
    listed = {str(seam) for seam in SEAMS if seam.apply and seam.kind in ("wrap", "add")}
    assert {"litgpt.config.Config.__post_init__", "litgpt.config.Config.from_file"} <= config
    # Operators of this package stand in a namespace of their own.
    config.add("torch.ops.litgpt_moe_ext")
    assert changed - config == {name for name in listed if not name.startswith("litgpt.config.Config.")}


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if seam.kind not in ("add", "source")], ids=str)
def test_every_name_exists(seam):
    importlib.import_module(seam.module)
    registration.check_names([seam])


def test_names_replaced_for_a_run_are_those_of_the_loop():
    strings = {
        node.value
        for node in ast.walk(ast.parse(Path(loop.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    replaced = {seam.name for seam in SEAMS if seam.kind == "run" and seam.module == "litgpt.pretrain"}
    assert replaced == strings & set(vars(litgpt.pretrain))


def test_modules_executed_from_source_are_those_that_wait():
    assert {seam.module for seam in SEAMS if seam.kind == "source"} == {
        *packages.PACKAGES,
        *modules.WITHOUT_COMPILER,
        *modules.CALLED_RARELY,
        modules.PLOTS,
        data_modules.MODULE,
        registrations.MODULE,
    }


def test_every_state_exists():
    text = (ROOT / "docs" / "reference" / "seams.md").read_text(encoding="utf-8")
    states = re.findall(r"^\| `(litgpt_moe_ext\.[\w.]+)\.(\w+)`", text, re.M)
    assert states
    for module, name in states:
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_the_table_names_every_seam():
    text = table()
    assert all(f"| `{seam}` | {seam.kind} |" in text for seam in SEAMS)
    assert all(line.count("|") in (0, 3, 5) for line in text.splitlines())


def test_missing_names_are_all_in_one_error(monkeypatch):
    monkeypatch.delattr(litgpt.model.GPT, "rope_cache")
    monkeypatch.delattr(litgpt.model, "LLaMAMLP")
    with pytest.raises(RuntimeError, match=r"lacks litgpt\.model\.LLaMAMLP, litgpt\.model\.GPT\.rope_cache, which"):
        registration.check_names([seam for seam in SEAMS if seam.module == "litgpt.model"])


def test_a_name_missing_in_a_command_is_a_warning(monkeypatch):
    """Whoever shares an environment with the plugin can go on."""
    module = types.ModuleType("litgpt_without_evaluate")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    seam = Seam(
        module.__name__, "convert_and_evaluate", "wrap", "Evaluates.", "never", lambda _: pytest.fail("applied")
    )
    with pytest.warns(RuntimeWarning, match=r"lacks litgpt_without_evaluate\.convert_and_evaluate.*Evaluates\."):
        registration._apply_later(seam, module)


def test_an_untested_version_warns_once(monkeypatch):
    monkeypatch.setattr(registration.importlib.metadata, "version", lambda _name: "0.6.0")
    with pytest.warns(RuntimeWarning, match=r"tested with litgpt 0\.5\.13, but 0\.6\.0 is installed"):
        registration.check_version()


def test_the_version_has_one_place():
    from importlib.metadata import version

    assert litgpt_moe_ext.__version__ == version("litgpt-moe-ext")
