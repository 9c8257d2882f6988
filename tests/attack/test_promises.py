"""What the pages promise is held by tests that exist."""

import ast
import html
import re
from pathlib import Path

import pytest

from litgpt_moe_ext.inspect.pages import page, picture, table

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/explanation/reliability.md"])
def test_every_promise_names_its_test(page):
    rows = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if "`tests/" in line]
    assert len(rows) >= 5
    for row in rows:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row):
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}, row
        assert row.count("`tests/") == len(re.findall(r"`tests/[\w/]+\.py::\w+`", row)), row


def test_what_stands_on_a_page_is_text():
    """Names of runs, tokens, and what a model writes."""
    words = [f"<script>{number}</script>&\"'" for number in range(4)]
    whole = page(words[0], [table([words[1]], [[words[2]]]), picture(words[3], words[3], b"")])
    assert "<script>" not in whole
    assert all(html.escape(word) in whole for word in words)


def test_every_load_is_of_weights_only():
    """`torch.load` without `weights_only=True` would run what a file asks for."""
    loads = 0
    for file in (ROOT / "litgpt_moe_ext").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "fabric.load", "pickle.load"):
                loads += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{file}:{node.lineno}"
    assert loads >= 3
