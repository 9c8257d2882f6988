"""Tables on the pages are those of the code."""

import importlib.util

import pytest

from tests.docs.pages import ROOT


def docs_tables():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "tools" / "docs_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_have_the_tables_of_the_code():
    module = docs_tables()
    stale = [page.name for page in module.PAGES if module.filled(page.read_text(encoding="utf-8")) != page.read_text()]
    assert not stale, "run `uv run python tools/docs_tables.py`"


def test_every_table_has_a_page():
    module = docs_tables()
    text = "".join(page.read_text(encoding="utf-8") for page in module.PAGES)
    assert all(f"<!-- table: {name} -->" in text for name in module.TABLES)


def test_a_table_that_nobody_makes_is_an_error():
    with pytest.raises(KeyError):
        docs_tables().filled("<!-- table: nobody -->\n<!-- end of table -->")
