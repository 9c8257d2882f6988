"""Parsers that hundreds of commands in one process share; a user's only command builds its own.

What jsonargparse makes of signatures and docstrings takes longer than the few training steps of most tests.
"""

import functools
from collections.abc import Hashable, Mapping
from typing import Any

import jsonargparse._actions as actions
import jsonargparse._core as core
import jsonargparse._optionals as docstrings
from jsonargparse import Namespace
from jsonargparse._typehints import ActionTypeHint

from litgpt_moe_ext.cli import settings


def build_once() -> None:
    """Let all commands of this process share what is read of the same classes."""
    docstrings.parse_docstring = _docstrings(docstrings.parse_docstring)
    ActionTypeHint.get_class_parser = staticmethod(_class_parsers(ActionTypeHint.get_class_parser))
    settings.build_parser = _parsers(settings.build_parser)
    actions.filter_default_actions = _filters(actions.filter_default_actions)
    find = _finder(actions._find_action_and_subcommand)
    actions._find_action_and_subcommand = core._find_action_and_subcommand = find


def _docstrings(parse: Any) -> Any:
    @functools.cache
    def parsed(component: Any, params: bool, attributes: bool) -> Any:
        return parse(component, params)

    def parse_docstring(component: Any, params: bool = False, logger: Any = None) -> Any:
        return parsed(component, params, _attributes())

    return parse_docstring


def _class_parsers(build: Any) -> Any:
    @functools.cache
    def built(val_class: type, init: Any, options: tuple, attributes: bool, has_default: bool) -> Any:
        parser = build(val_class, dict(options))
        return parser, [(action, action.default) for action in parser._actions], dict(parser._defaults)

    def get_class_parser(val_class: Any, sub_add_kwargs: Any = None, skip_args: Any = None) -> Any:
        options = dict(sub_add_kwargs or {})
        default = options.pop("default", None)
        is_plain = all(isinstance(value, Hashable) for value in options.values())
        has_fields = default is None or (isinstance(default, Namespace) and "class_path" not in default)
        if not (isinstance(val_class, type) and is_plain and has_fields and not skip_args):
            return build(val_class, sub_add_kwargs, skip_args)
        # A class that got more fields has another constructor.
        key = val_class, val_class.__init__, tuple(options.items()), _attributes(), default is not None
        parser, own_defaults, own_names = built(*key)
        if default is not None:
            # Those of the last command go, whichever it had.
            for action, own in own_defaults:
                action.default = own
            parser._defaults = dict(own_names)
            parser.set_defaults(default.as_dict())
        return _fresh(parser)

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


def _finder(find: Any) -> Any:
    known: dict[int, tuple[list, int, dict[str, list] | None]] = {}

    def find_action_and_subcommand(parser: Any, dest: str, exclude: Any = None) -> Any:
        # Every key of every section is looked for among the hundred actions, several times.
        given = parser._actions
        before, length, by_name = known.get(id(given), (None, 0, None))
        if before is not given or length != len(given):
            if len(known) > 20:
                known.clear()
            by_name = _by_name(actions.filter_default_actions(given))
            known[id(given)] = given, len(given), by_name
        if by_name is None:
            return find(parser, dest, exclude)
        fallback = None
        for action in by_name.get(dest, ()):
            if exclude is not None and isinstance(action, exclude):
                continue
            if not isinstance(action, (actions._ActionConfigLoad, getattr(actions, "ActionFail", ()))):
                return action, None
            fallback = action
        return fallback, None

    return find_action_and_subcommand


def _by_name(given: list) -> dict[str, list] | None:
    """Return the actions by what they are called; None where they have subcommands."""
    names: dict[str, list] = {}
    for action in given:
        if isinstance(action, actions._ActionSubCommands):
            return None
        for name in {action.dest, *(option.removeprefix("--") for option in action.option_strings)}:
            names.setdefault(name, []).append(action)
    return names


def _attributes() -> bool:
    return docstrings.get_docstring_parse_options()["attribute_docstrings"]
