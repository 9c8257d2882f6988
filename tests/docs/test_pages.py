"""What README and docs show is run, or says why it is not."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from litgpt_moe_ext.study.file import load_study
from tests.docs.pages import PAGES, ROOT, blocks, code
from tests.runs import PATIENCE, run_command
from tests.settings import read_settings

# The order in which a reader meets them: training comes before what looks at its result.
READING_ORDER = [ROOT / "docs" / "tutorial.md", *(page for page in PAGES if page.name != "tutorial.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_run_or_says_why_not(page):
    for block in blocks(page):
        assert block.run or block.reason, f"mark {block.commands} as <!-- run: NAME --> or <!-- not run: REASON -->"


YAML = [pytest.param(text, id=page.stem) for page in PAGES for text in code(page, "yaml")]


@pytest.mark.parametrize("text", YAML)
def test_recipes_and_studies_have_keys_that_exist(tmp_path, text):
    """A part of one is taken on top of the quickstart."""
    content, file = yaml.safe_load(text), tmp_path / "shown.yaml"
    if {"arms", "search"} & set(content):
        file.write_text(yaml.safe_dump({"question": "?", "recipe": "quickstart", "arms": {"it": {}}, **content}))
        assert load_study(file).runs
    else:
        file.write_text(text)
        read_settings(["--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", str(file)])


def test_whatever_opens_an_export_with_its_own_code_says_that_it_is_trusted():
    """In transformers 5 the tokenizer too, which otherwise asks at the terminal, although it runs none of the code."""
    programs = [program for page in PAGES for program in code(page, "python")]
    calls = [node for program in programs for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Call)]
    opening = [call for call in calls if any(ast.unparse(a) == "'exported/quickstart'" for a in call.args)]
    assert {ast.unparse(call.func).partition(".")[0] for call in opening} >= {"AutoTokenizer", "pipeline"}
    for call in opening:
        assert "trust_remote_code=True" in ast.unparse(call), ast.unparse(call)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A copy of what a clone has, with a quickstart of a few layers, files and steps, and this environment as `uv`."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("configs", "data_prep", "docs", "examples"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "run_train.py", root)
    recipe = root / "configs" / "quickstart.yaml"
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    source = root / "source"
    source.mkdir()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py")):
        shutil.copy(file, source)
    settings["data"]["init_args"]["source_path"] = str(source)
    settings["model_config"]["n_layer"] = 2
    settings["train"] |= {"max_tokens": 24 * 2048, "save_interval": 12, "lr_warmup_steps": 4}
    settings["eval"] |= {"interval": 12, "max_iters": 2}
    settings["sample"]["max_new_tokens"] = 4
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    uv = root / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/sh\nshift\nexec "$@"\n', encoding="utf-8")
    uv.chmod(0o755)
    return root


@pytest.mark.slow
def test_the_pages_commands_work(workspace):
    path = os.pathsep.join([str(workspace / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "2"}
    done = set()
    for page in READING_ORDER:
        for block in blocks(page):
            if not block.run:
                continue
            for command in block.commands:
                if command in done:
                    continue
                result = subprocess.run(
                    command,
                    shell=True,
                    cwd=workspace,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE,
                )
                assert result.returncode == block.status, f"{block.page}: {command}\n{result.stdout}{result.stderr}"
                printed = " ".join((result.stdout + result.stderr).split())
                for part in block.shown.split("..."):
                    assert " ".join(part.split()) in printed, f"{block.page}: {command}\n{printed}"
                done.add(command)
        for program in code(page, "python"):
            run_command(sys.executable, "-c", program, cwd=workspace, **environment)
            done.add(program)
    assert any("AutoModelForCausalLM" in program for program in done)
    assert any("run_train.py" in command for command in done)
