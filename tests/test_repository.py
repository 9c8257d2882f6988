"""The project keeps its promises: no host in the lock file, no unknown key in a recipe, help that answers at once."""

import importlib
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.runs import ROOT, run_command, small_disk, tool

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

LOCK = """version = 1
[[package]]
name = "a"
source = { registry = "https://host.example/simple" }
sdist = { url = "https://host.example/files/a-1.0.tar.gz", hash = "sha256:00", size = 1 }
wheels = [
    { url = "https://host.example/files/a-1.0-py3-none-any.whl", hash = "sha256:01", size = 2 },
]

[[package]]
name = "own"
source = { editable = "." }
dependencies = [
    { name = "a" },
]

[package.metadata]
requires-dist = [
    { name = "a", url = "https://host.example/a" },
]

[package.metadata.requires-dev]
dev = [{ name = "pytest", specifier = ">=8" }]

[[package]]
name = "z"
source = { registry = "https://host.example/simple" }
"""

PORTABLE = """version = 1
[[package]]
name = "a"
source = { registry = "index" }
sdist = { path = "a-1.0.tar.gz", hash = "sha256:00", size = 1 }
wheels = [
    { path = "a-1.0-py3-none-any.whl", hash = "sha256:01", size = 2 },
]

[[package]]
name = "own"
source = { editable = "." }
dependencies = [
    { name = "a" },
]

[[package]]
name = "z"
source = { registry = "index" }
"""


@pytest.mark.parametrize("module", ["litgpt_moe_ext.cli.main", "litgpt_moe_ext.cli.train", "litgpt_moe_ext"])
def test_what_has_a_main_answers_to_python_m(module):
    answer = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "usage: litgpt-moe" in answer.stdout


def test_portable_lock():
    portable = tool("portable_lock").portable
    assert portable(LOCK) == PORTABLE
    assert portable(PORTABLE) == PORTABLE


@pytest.mark.parametrize(("content", "status"), [(LOCK, 1), (PORTABLE, 0)])
def test_portable_lock_check(tmp_path, content, status):
    file = tmp_path / "uv.lock"
    file.write_text(content)
    script = str(ROOT / "tools" / "portable_lock.py")
    assert subprocess.run([sys.executable, script, "--check", str(file)], capture_output=True).returncode == status
    filtered = subprocess.run([sys.executable, script], input=content.encode(), capture_output=True)
    assert filtered.stdout.decode() == PORTABLE


def test_what_the_check_says_mends_the_lock(tmp_path):
    """In a repository whose lock was added without the filter."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    script = ROOT / "tools" / "portable_lock.py"
    (tmp_path / "uv.lock").write_text(LOCK)
    git("init", "--quiet")
    git("add", "uv.lock")
    checked = [sys.executable, script, "--check", "/dev/stdin"]
    refused = subprocess.run(checked, input=git("show", ":uv.lock"), capture_output=True, text=True)
    assert refused.returncode == 1
    command = refused.stderr.split("`")[1]
    (tmp_path / ".gitattributes").write_text("uv.lock filter=portable-lock\n")
    git("config", "filter.portable-lock.clean", f"{sys.executable} '{script}'")
    git(*command.split()[1:])
    assert git("show", ":uv.lock") == PORTABLE


def test_help_loads_neither_torch_nor_litgpt():
    code = (
        "import sys; from litgpt_moe_ext.cli.train import main\n"
        "status = main(['--help'])\n"
        "assert status == 0 and not {'torch', 'lightning', 'transformers'} & set(sys.modules), 'heavy imports'"
    )
    shown = run_command(sys.executable, "-c", code).stdout
    for expected in (
        "--config",
        "--resume",
        "--train.max_tokens",
        "--eval.interval",
        "--compile",
        "--micro-batch-size",
    ):
        assert expected in shown
    assert "Total number of tokens to train on" in " ".join(shown.split())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_known(recipe):
    """The parser refuses unknown keys; the model configuration is built and counted."""
    from litgpt_moe_ext.model_size import count_parameters
    from tests.settings import read_settings

    assert count_parameters(read_settings(["--config", str(recipe)]).model_config).active > 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_section_of_a_recipe_is_commented(recipe):
    text = recipe.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert len(comments) >= len(content)


def test_quickstart_is_the_size_the_readme_says():
    from litgpt import Config

    from litgpt_moe_ext.model_size import count_parameters

    content = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    size = count_parameters(Config(**content["model_config"]))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{size.total / 1e6:.1f}M / {size.active / 1e6:.1f}M" in readme


def test_the_lowest_torch_that_is_tested_is_the_lowest_that_is_allowed():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "bounds.yml").read_text())
    lowest, _ = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert lowest["torch"].replace("==", ">=").removesuffix(".*") in allowed


def test_a_small_disk_leaves_no_half_of_a_module(tmp_path, monkeypatch):
    """In the environment of whoever runs the tests, for whom the module could not be imported any more."""
    (tmp_path / "first_imported.py").write_text(f"TEXT = {'x' * 1000!r}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with small_disk(500):
        importlib.import_module("first_imported")
    assert not list(tmp_path.rglob("*.pyc"))
