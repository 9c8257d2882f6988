"""Tables on the pages are those of the code."""

import shutil
import subprocess
import sys

import pytest

from tests.runs import ROOT, tool


def test_pages_have_the_tables_of_the_code():
    module = tool("docs_tables")
    stale = [page.name for page in module.PAGES if module.filled(page.read_text(encoding="utf-8")) != page.read_text()]
    assert not stale, "run `uv run python tools/docs_tables.py`"


def test_every_table_has_a_page():
    module = tool("docs_tables")
    text = "".join(page.read_text(encoding="utf-8") for page in module.PAGES)
    assert all(f"<!-- table: {name} -->" in text for name in module.TABLES)


def test_a_table_that_nobody_makes_is_an_error():
    with pytest.raises(KeyError):
        tool("docs_tables").filled("<!-- table: nobody -->\n<!-- end of table -->")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: seams -->\nno end",
        "<!-- end of table -->",
        "<!-- table: seams -->\n<!-- table: settings -->\n<!-- end of table -->",
    ],
)
def test_a_table_without_both_its_marks_is_an_error(text):
    """It would stay as it is, or take what follows with it."""
    with pytest.raises(ValueError, match="table"):
        tool("docs_tables").filled(text)


@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--chekc", 2)])
def test_only_a_bare_call_writes(tmp_path, option, status):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "docs_tables.py", tmp_path / "tools")
    page = tmp_path / "README.md"
    page.write_text("<!-- table: seams -->\n<!-- end of table -->\n")
    command = [sys.executable, tmp_path / "tools" / "docs_tables.py", option]
    assert subprocess.run(command, capture_output=True, check=False).returncode == status
    assert page.read_text() == "<!-- table: seams -->\n<!-- end of table -->\n"
