"""Classes of the tokens of texts that can be classified by eye."""

import re

from litgpt_moe_ext.inspect.experts.token_classes import PYTHON_CLASSES, TEXT_CLASSES, python_classes, text_classes

SOURCE = 'def f(x):\n    # add\n    return x + 1.5, "a b"\n'


def classified(classes_of, text: str, pattern: str) -> list[tuple[str, str]]:
    spans = [match.span() for match in re.finditer(pattern, text)]
    return [(text[start:stop], name) for (start, stop), name in zip(spans, classes_of(text, spans), strict=True)]


def test_python():
    found = classified(python_classes, SOURCE, r'\n| +(?=[#r])|"[^"]*"|# ?\w+| ?[\w.]+| (?!")[^\w\s]|[^\w\s]| ')
    assert found == [
        ("def", "keyword"),
        (" f", "name"),
        ("(", "operator"),
        ("x", "name"),
        (")", "operator"),
        (":", "operator"),
        ("\n", "line break"),
        ("    ", "indentation"),
        ("# add", "comment"),
        ("\n", "line break"),
        ("    ", "indentation"),
        ("return", "keyword"),
        (" x", "name"),
        (" +", "operator"),
        (" 1.5", "number"),
        (",", "operator"),
        (" ", "space"),
        ('"a b"', "string"),
        ("\n", "line break"),
    ]
    assert {name for _, name in found} <= set(PYTHON_CLASSES)


def test_python_cut_off_or_no_python():
    assert python_classes("x = (1,\n", [(0, 1), (5, 6)]) == ["name", "number"]
    assert python_classes("don't know", [(0, 3), (5, 10)])[0] == "name"
    assert python_classes("\u00e9\u00e9 = 1", [(0, 1), (5, 6)]) == ["name", "number"]


def test_what_other_tools_take_for_the_end_of_a_line():
    """Old sources have form feeds between their parts."""
    text = 'x = "a\u2028b"\n\x0c\ndef f(): 1\r\ny = 2'
    spans = [(4, 9), (12, 15), (16, 17), (21, 22), (24, 25), (28, 29)]
    assert [text[start:stop] for start, stop in spans] == ['"a\u2028b"', "def", "f", "1", "y", "2"]
    assert python_classes(text, spans) == ["string", "keyword", "name", "number", "name", "number"]


def test_prose():
    found = classified(text_classes, "Once, 12 dogs\nran  by", r"Onc|e|,| 12| dogs|\n|ran| (?= )| by")
    assert found == [
        ("Onc", "word start"),
        ("e", "word part"),
        (",", "punctuation"),
        (" 12", "number"),
        (" dogs", "word start"),
        ("\n", "line break"),
        ("ran", "word start"),
        (" ", "space"),
        (" by", "word start"),
    ]
    assert {name for _, name in found} <= set(TEXT_CLASSES)
