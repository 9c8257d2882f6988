"""Tables of the fields of a model configuration for the documentation: `python -m litgpt_moe_ext.config.tables`."""

from litgpt_moe_ext.config.fields import ATTENTION_FIELDS, FEED_FORWARD_FIELDS, FIELDS, REQUIRED, ROUTING_FIELDS, Field
from litgpt_moe_ext.field_types import describe

SECTIONS = {
    "Feed-forward layers and experts": FEED_FORWARD_FIELDS,
    "Routing and balancing": ROUTING_FIELDS,
    "Attention": ATTENTION_FIELDS,
}


def markdown() -> str:
    """Return a Markdown table of each section."""
    parts = []
    for title, names in SECTIONS.items():
        rows = [f"| {title} | value | meaning |", "| --- | --- | --- |"]
        rows += [f"| `{name}` | {_value(FIELDS[name])} | {FIELDS[name].doc} |" for name in names]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _value(field: Field) -> str:
    text = describe(field.type)
    if field.default is REQUIRED:
        return f"{text}; required"
    default = field.unset if field.default is None else field.default
    return text if default is None else f"{text} ({str(default).lower()})"


if __name__ == "__main__":
    print(markdown(), end="")
