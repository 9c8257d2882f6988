"""The code that trains a run: the versions of this package, with its commit if git tracks it, and of torch."""

import subprocess
from pathlib import Path

from litgpt_moe_ext import __version__

_PACKAGE = Path(__file__).parent


def software() -> str:
    """Return the code that trains a run, as `litgpt_moe_ext 0.1.0, commit 0123456789ab+changes, torch 2.11.0`."""
    import torch

    return f"litgpt_moe_ext {code_version()}, torch {torch.__version__}"


def code_version(package: Path = _PACKAGE) -> str:
    """Return the version of this package, with its commit if git tracks it, as `0.1.0, commit 0123456789ab+changes`.

    Args:
        package: Its folder.
    """
    # If installed into an environment inside another repository, that repository does not track it. A new repository
    # may have no commit yet.
    commit = _git(package, "ls-files", "__init__.py") and _git(package, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return __version__
    changes = "+changes" if _git(package, "status", "--porcelain", "--", ".") else ""
    return f"{__version__}, commit {commit}{changes}"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
        return ""
