"""The wheel works without the repository: commands start, and recipes are inside."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, **options) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="builds with uv")
def test_the_wheel_needs_no_repository(tmp_path):
    run("uv", "build", "--quiet", "--out-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("uv", "pip", "install", "--quiet", "--no-deps", "--offline", "--target", target, wheel)
    inside = {"env": {**os.environ, "PYTHONPATH": str(target)}, "cwd": elsewhere}
    where = run(sys.executable, "-c", "import litgpt_moe_ext; print(litgpt_moe_ext.__file__)", **inside)
    assert Path(where.strip()).is_relative_to(target)
    command = (sys.executable, target / "bin" / "litgpt-moe")
    assert "init" in run(*command, "--help", **inside)
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert [line.split()[0] for line in run(*command, "init", **inside).splitlines()] == [r.stem for r in recipes]
    for recipe in recipes:
        run(*command, "init", recipe.stem, **inside)
        assert (elsewhere / recipe.name).read_text() == recipe.read_text()
