"""The commands that README and docs show, with what their pages say about running them, and recipes of examples."""

import ast
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*) -->\n+)?```bash(?P<info>[^\n]*)\n(?P<body>.*?)^```", re.M | re.S)
_OUTPUT = re.compile(r"\n+```text\n(.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of shell commands on a page.

    Attributes:
        page: Path of the page from the repository's root.
        commands: One command per line; a continued line is joined.
        run: Whether the page says that it is run.
        status: The exit status that the page promises.
        shown: What the page says that it prints, where that is the same everywhere; "..." stands for lines left out.
        reason: Why it is not run; empty if it is.
    """

    page: str
    commands: tuple[str, ...]
    run: bool
    status: int
    shown: str
    reason: str


def blocks(page: Path) -> list[Block]:
    """Return the shell blocks of a page that are commands to type; a block with a title is the content of a file."""
    found, text = [], page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        if "title=" in match["info"]:
            continue
        kind, _, rest = (match["mark"] or "").partition(": ")
        body = match["body"].replace("\\\n", " ")
        commands = tuple(line for line in body.splitlines() if line.strip() and not line.startswith("#"))
        status = int(exit_mark[1]) if (exit_mark := re.search(r"exit (\d+)", rest)) else 0
        shown = _OUTPUT.match(text, match.end())[1] if "shows" in rest else ""
        page_name = str(page.relative_to(ROOT))
        found.append(Block(page_name, commands, kind == "run", status, shown, rest if kind == "not run" else ""))
    return found


def code(page: Path, language: str) -> list[str]:
    """Return the blocks of a page in a language that is not the shell's."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def recipe_of(example: str) -> str:
    """Return the recipe that the docstring of an example shows: the first indented block with keys."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / f"{example}.py").read_text(encoding="utf-8")))
    return textwrap.dedent(re.search(r"^    \w+:\n(?:    .*\n)+", text, re.M)[0])
