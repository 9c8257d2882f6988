"""Tables on the pages are those of the code."""

import pytest

from tests.runs import tool


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
