"""What other packages register has a name that settings can have, and is of its kind."""


def require(name: object, entry: object, kind: type) -> None:
    """Raise ValueError unless a name can be part of the names of fields and of flags, and an entry is of its kind."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{name!r} must be a name of letters, digits and underscores that begins with no digit")
    if not isinstance(entry, kind):
        given = entry.__name__ if isinstance(entry, type) else repr(entry)
        raise ValueError(f"{name!r}: {given} must be an instance of {kind.__name__}")
