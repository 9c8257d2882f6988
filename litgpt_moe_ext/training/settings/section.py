"""The base class of all groups of settings, and the table of fields that the documentation shows."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

from litgpt_moe_ext.errors import refuse_first
from litgpt_moe_ext.field_types import check_fields


class Section:
    """A dataclass of settings that checks types, ranges and choices whenever it is constructed.

    Attributes:
        key: Name of the group in a recipe; empty for the whole tree.
    """

    key: ClassVar[str] = ""

    def __init_subclass__(cls, key: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.key = key

    def __post_init__(self) -> None:
        check_fields(self, self.name_of(""))
        refuse_first(self.problems())

    def problems(self) -> Iterator[str]:
        """Yield problems of settings that are each valid but do not go together."""
        yield from ()

    @classmethod
    def name_of(cls, field: str) -> str:
        """Return the name of a field as the user writes it."""
        return f"{cls.key}.{field}" if cls.key else field


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting in the documentation.

    Attributes:
        name: Name on the command line, such as `train.max_tokens`.
        type: Annotation; a string for LitGPT's own types.
        default: Default value.
        doc: Docstring, in one line.
    """

    name: str
    type: Any
    default: Any
    doc: str


def field_table(cls: type, prefix: str = "") -> Iterator[Row]:
    """Yield a row for every setting of a tree of sections, in the order of their definition.

    Args:
        cls: A dataclass whose attributes have docstrings.
        prefix: Prefix of the names, with its dot.
    """
    docs = attribute_docs(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if inspect.isclass(field.type) and issubclass(field.type, Section):
            yield from field_table(field.type, f"{name}.")
        else:
            yield Row(name, field.type, default_of(field), docs[field.name])


def default_of(field: dataclasses.Field) -> Any:
    """Return the default value of a field, or None if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def attribute_docs(cls: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's attributes by name, each in one line."""
    import docstring_parser

    found = docstring_parser.parse_from_object(cls).params
    return {doc.arg_name: " ".join((doc.description or "").split()) for doc in found}
