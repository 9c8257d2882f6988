"""Reports as self-contained HTML pages."""

import base64
import html
import re
from collections.abc import Iterable

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, figcaption { max-width: 48rem; color: #444; } figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; min-width: 9rem; } td.tokens { text-align: left; }
code { background: #f2f2f2; border-radius: 3px; padding: 0 .25em; white-space: pre; margin-right: .3em; }
.scroll { overflow-x: auto; } .whole { white-space: nowrap; }
"""
_BREAKS = re.compile(r"\S*[/-]\S*")


def page(title: str, parts: Iterable[str]) -> str:
    """Return an HTML page of a heading and parts, without external resources.

    Args:
        title: Plain text.
        parts: Results of `picture` and `table`.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{html.escape(title)}</title><style>{_CSS}</style></head>'
        f"<body><h1>{words(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def words(plain: str) -> str:
    """Return plain text as HTML that breaks lines only between words, not within a path, a command or a name."""
    return _BREAKS.sub(r'<span class="whole">\g<0></span>', html.escape(plain))


def picture(heading: str, caption: str, image: bytes) -> str:
    """Return a section with a PNG inside it; heading and caption are plain text."""
    heading, data = html.escape(heading), base64.b64encode(image).decode("ascii")
    return (
        f'<h2>{heading}</h2><figure><img alt="{heading}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words(caption)}</figcaption></figure>"
    )


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of plain texts that scrolls if it is too wide."""
    head = "".join(f"<th>{words(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{words(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
