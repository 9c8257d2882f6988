"""The wheel works without the repository: commands start, and recipes are inside."""

import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.runs import ROOT, run_command


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="builds with uv")
def test_the_wheel_needs_no_repository(tmp_path):
    run_command("uv", "build", "--quiet", "--out-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_command("uv", "pip", "install", "--quiet", "--no-deps", "--offline", "--target", target, wheel)
    python = partial(run_command, sys.executable, cwd=elsewhere, PYTHONPATH=str(target))
    where = python("-c", "import litgpt_moe_ext; print(litgpt_moe_ext.__file__)").stdout
    assert Path(where.strip()).is_relative_to(target)
    command = target / "bin" / "litgpt-moe"
    assert "init" in python(command, "--help").stdout
    assert "init" in python("-m", "litgpt_moe_ext", "--help").stdout
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert [line.split()[0] for line in python(command, "init").stdout.splitlines()] == [r.stem for r in recipes]
    for recipe in recipes:
        python(command, "init", recipe.stem)
        assert (elsewhere / recipe.name).read_text() == recipe.read_text()
