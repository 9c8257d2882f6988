"""Parsers that hundreds of commands in one process share; a user's only command builds its own.

What jsonargparse makes of signatures and docstrings takes longer than the few training steps of most tests.
"""

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import jsonargparse._actions as actions
import jsonargparse._optionals as docstrings
from jsonargparse._typehints import ActionTypeHint

from litgpt_moe_ext.cli import train


def build_once() -> None:
    """Let all commands of this process share what is read of the same classes."""
    docstrings.parse_docstring = _docstrings(docstrings.parse_docstring)
    ActionTypeHint.get_class_parser = staticmethod(_class_parsers(ActionTypeHint.get_class_parser))
    train.build_parser = _parsers(train.build_parser)
    actions.filter_default_actions = _filters(actions.filter_default_actions)


def _docstrings(parse: Any) -> Any:
    @functools.cache
    def parsed(component: Any, params: bool, attributes: bool) -> Any:
        return parse(component, params)

    def parse_docstring(component: Any, params: bool = False, logger: Any = None) -> Any:
        return parsed(component, params, _attributes())

    return parse_docstring


def _class_parsers(build: Any) -> Any:
    @functools.cache
    def built(val_class: type, init: Any, options: tuple, attributes: bool) -> Any:
        return build(val_class, dict(options))

    def get_class_parser(val_class: Any, sub_add_kwargs: Any = None, skip_args: Any = None) -> Any:
        options = tuple((sub_add_kwargs or {}).items())
        plain = all(isinstance(value, Hashable) for _, value in options)
        if isinstance(val_class, type) and plain and not skip_args:
            # A class that got more fields has another constructor.
            return _fresh(built(val_class, val_class.__init__, options, _attributes()))
        return build(val_class, sub_add_kwargs, skip_args)

    return get_class_parser


def _parsers(build: Any) -> Any:
    @functools.cache
    def built(types: tuple) -> Any:
        return build(dict(types))

    def build_parser(types: Mapping[str, Any]) -> Any:
        # A help text adds to its parser.
        return build(types) if types["data"] is dict else _fresh(built(tuple(types.items())))

    return build_parser


def _fresh(parser: Any) -> Any:
    # jsonargparse leaves with an action what the last command had in its place.
    for action in parser._actions:
        getattr(action, "sub_add_kwargs", {}).pop("default", None)
    return parser


def _filters(keep: Any) -> Any:
    known: dict[int, tuple[list, int, list]] = {}

    def filter_default_actions(given: Any) -> Any:
        # Asked again and again of the hundred actions of one parser.
        if not isinstance(given, list):
            return keep(given)
        before, length, kept = known.get(id(given), (None, 0, []))
        if before is not given or length != len(given):
            if len(known) > 20:
                known.clear()
            kept = keep(given)
            known[id(given)] = given, len(given), kept
        return kept

    return filter_default_actions


def _attributes() -> bool:
    return docstrings.get_docstring_parse_options()["attribute_docstrings"]
