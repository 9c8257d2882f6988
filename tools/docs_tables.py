"""Write the generated tables of the documentation: `uv run python tools/docs_tables.py [--check]`.

A page has a table between `<!-- table: NAME -->` and `<!-- end of table -->`. Tables are committed, so that pages read
the same in a repository browser and on the site; with `--check`, a page that would change is an error.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_PLACE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- end of table -->)", re.S)
_MARK = re.compile(r"<!-- (?:table: |end of table)")


def model_config() -> str:
    """Return the fields of a model configuration."""
    from litgpt_moe_ext.config import fields
    from litgpt_moe_ext.field_types import describe

    def value(field: fields.Field) -> str:
        text = describe(field.type)
        if field.default is fields.REQUIRED:
            return f"{text}; required"
        default = field.unset if field.default is None else field.default
        return text if default is None else f"{text} ({str(default).lower()})"

    sections = {
        "Feed-forward layers and experts": fields.FEED_FORWARD_FIELDS,
        "Routing and balancing": fields.ROUTING_FIELDS,
        "Attention": fields.ATTENTION_FIELDS,
    }
    return "\n".join(
        _table((title, "value", "meaning"), ((f"`{name}`", value(field), field.doc) for name, field in section.items()))
        for title, section in sections.items()
    )


def settings() -> str:
    """Return every key of a recipe except `model_config`."""
    from litgpt_moe_ext.training.settings import Settings, field_table

    return _table(
        ("key", "default", "meaning"),
        (
            (f"`{row.name}`", _default(row.default), _escape(row.doc))
            for row in field_table(Settings)
            if not row.name.startswith("model_config")
        ),
    )


def commands() -> str:
    """Return the commands of `litgpt-moe` with their arguments."""
    from docstring_parser import parse

    from litgpt_moe_ext.cli.arguments import build_parser
    from litgpt_moe_ext.cli.main import COMMANDS, load

    parts = []
    for command in COMMANDS:
        cls = load(command)
        doc = parse(cls.__doc__ or "")
        text = " ".join(part for part in (doc.short_description, doc.long_description) if part)
        actions = build_parser(cls, f"litgpt-moe {command.name}")._actions[1:]  # the first is --help
        rows = ((f"`{_usage(action)}`", _escape((action.help or "").replace("%%", "%"))) for action in actions)
        parts.append(f"### `litgpt-moe {command.name}`\n\n{_unwrap(text)}\n\n{_table(('argument', 'meaning'), rows)}")
    return "\n".join(parts)


def _usage(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar)
    return action.option_strings[0] if action.const else f"{action.option_strings[0]} {action.metavar}"


def seams() -> str:
    """Return the seams."""
    from litgpt_moe_ext.host.seams import table

    return table() + "\n"


def expert_backends() -> str:
    """Return which expert backend is preferred where."""
    from litgpt_moe_ext.moe.kernels.registry import PREFERENCES

    def where(preference: Any) -> str:
        words = [preference.device or "anything else"]
        if preference.majors:
            words.append("compute capability " + " and ".join(f"{major}.x" for major in preference.majors))
        if preference.dtypes:
            words.append(", ".join(str(dtype).removeprefix("torch.") for dtype in preference.dtypes))
        if preference.compiling:
            words.append("under `torch.compile`")
        return ", ".join(words)

    return _table(
        ("where", "backends, best first"),
        ((where(preference), ", ".join(f"`{name}`" for name in preference.backends)) for preference in PREFERENCES),
    )


TABLES: dict[str, Callable[[], str]] = {
    "model-config": model_config,
    "settings": settings,
    "commands": commands,
    "seams": seams,
    "expert-backends": expert_backends,
}


def filled(text: str) -> str:
    """Return a page with its tables regenerated."""
    for place in _PLACE.finditer(text):
        if _MARK.search(place["table"]):
            raise ValueError(f"the table {place['name']} does not end before the next")
    if _MARK.search(_PLACE.sub("", text)):
        raise ValueError("a table has only one of the two marks around it")
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place['name']]()}\n{place[4]}", text)


def main() -> int:
    """Write all pages, or with `--check` print which would change."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page would change")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    if stale and check:
        print(f"run `uv run python tools/docs_tables.py`: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if value == "":
        return '`""`'
    return "" if dataclasses.is_dataclass(value) else f"`{value}`"


def _escape(text: str) -> str:
    return _unwrap(text).replace("|", "\\|")


def _unwrap(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
