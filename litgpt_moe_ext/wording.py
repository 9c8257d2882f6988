"""Numbers in the words of messages."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 step, 1,440 steps, 2 processes.

    Args:
        number: How many there are.
        noun: What they are, in the singular, of those whose plural ends in `s` or `es`. Words may stand before it, as
            in `training token`.
    """
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's'}"
