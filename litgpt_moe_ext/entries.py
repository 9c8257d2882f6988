"""Checks the names and types of entries that other packages register."""


def require(name: object, entry: object, kind: type) -> None:
    """Raise ValueError unless a name can be part of field and flag names, and an entry has the right type."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{name!r} must be a name of letters, digits and underscores that begins with no digit")
    if not isinstance(entry, kind):
        given = entry.__name__ if isinstance(entry, type) else repr(entry)
        raise ValueError(f"{name!r}: {given} must be an instance of {kind.__name__}")
