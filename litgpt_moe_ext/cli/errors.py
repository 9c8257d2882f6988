"""How a command line ends: its exit status, and one line for what the user can mend.

Only `SettingsError` is the user's to mend. Every other exception is a fault of the program or of the machine, and keeps
its traceback; Python's exit status for it is 1.
"""

import sys
from collections.abc import Callable

from litgpt_moe_ext.errors import SettingsError

CANNOT = 1
"""Exit status: everything that was given is right, but the answer is no, or the work cannot go on."""
WRONG_SETTING = 2
"""Exit status: a setting or an input is wrong."""
INTERRUPTED = 130
"""Exit status after Ctrl-C."""


def exit_status(run: Callable[[], int | None]) -> int:
    """Run something and return its exit status, reporting wrong settings in one line on standard error.

    Args:
        run: Returns an exit status, or None for success.
    """
    try:
        return run() or 0
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_SETTING
    except KeyboardInterrupt:
        return INTERRUPTED
