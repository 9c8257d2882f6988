"""The error that every check raises, and other people's errors in it. Imports nothing, so that any room may use it."""


class SettingsError(ValueError):
    """A setting or an input of the user is wrong.

    Raised where the check is, and nowhere else: command lines print it as one line, everything else keeps its
    traceback. The message is one line of the form ``name: value must be ...; remedy``, where the name is the setting as
    the user writes it (``train.max_norm``, ``model_config.n_expert``).
    """

    @property
    def setting(self) -> str:
        """Name of the setting, as the message begins; empty if it names none."""
        name = str(self).partition(":")[0]
        return name if name.replace(".", "_").isidentifier() else ""


def one_line(error: object) -> str:
    """Return the message of an error, which may have many lines, in one."""
    return " ".join(str(error).split())
