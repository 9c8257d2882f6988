"""Fields that LitGPT's `Config` declares optional and always sets."""

from typing import TypeVar

Value = TypeVar("Value")


def derived(value: Value | None) -> Value:
    """Return the value of such a field.

    Raises:
        ValueError: If it is not set, because the configuration did not come from `Config(...)`.
    """
    if value is None:
        raise ValueError("the configuration lacks derived fields; make it with litgpt.Config(...)")
    return value
