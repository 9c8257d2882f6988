"""The page of metrics has what a run logs."""

import csv
import re

from litgpt_moe_ext.moe.registry import LOSSES
from litgpt_moe_ext.training.callbacks.expert_images import NAME as PICTURE
from litgpt_moe_ext.training.logs.metrics import COLUMNS
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "reference" / "metrics.md"
# What stands for a name or a number on the page.
ANY = {"LOSS_NAME": "|".join(LOSSES), "NAME": ".+", "LL": r"\d\d", "EE": r"\d\d", "...": ".+"}


def named() -> re.Pattern[str]:
    """Return what matches each name in the first column of the table."""
    cells = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    names = [name for cell in cells for name in re.findall("`(.+?)`", cell)]
    parts = re.compile("(" + "|".join(map(re.escape, ANY)) + ")")
    return re.compile(
        "|".join("".join(f"(?:{ANY.get(part, re.escape(part))})" for part in parts.split(name)) for name in names)
    )


def test_every_column_of_the_wide_table_is_on_the_page(finished, tmp_path):
    with open(finished(tmp_path) / "metrics-wide.csv", newline="") as file:
        columns = next(csv.reader(file))
    missing = [name for name in [*columns, PICTURE] if not named().fullmatch(name)]
    assert len(columns) > 50
    assert not missing


def test_the_columns_of_the_narrow_table_are_on_the_page():
    columns = ", ".join(f"`{name}`" for name in COLUMNS)
    assert columns in PAGE.read_text(encoding="utf-8").replace("\n  ", " ")
