"""Write uv.lock in a form that names no download host.

uv records the address of every file it locked. A mirror or a private index would leak into the repository that way, and
a reader behind another index could not use the lock. The portable form keeps every version and hash and drops the
addresses; uv resolves again on the reader's own index and takes the locked versions as preferences.

Used as a git clean filter (see CONTRIBUTING.md), so that `git add` always stores the portable form:

    git config filter.portable-lock.clean "python3 tools/portable_lock.py"

and as a check, which CI runs on the committed file:

    git show HEAD:uv.lock | python3 tools/portable_lock.py --check /dev/stdin
"""

import argparse
import re
import sys

_REGISTRY = re.compile(r'registry = "[^"]*"')
_URL = re.compile(r'url = "[^"]*/(?P<file>[^"/]+)"')
_METADATA_TABLE = re.compile(r"^\[package\.metadata[^\n]*\]\n(?:(?!\[).*\n?)*", re.MULTILINE)


def portable(lock: str) -> str:
    """Return `lock` (the text of a uv.lock file) without addresses; applying it twice changes nothing."""
    lock = _REGISTRY.sub('registry = "index"', lock)
    lock = _URL.sub(lambda match: f'path = "{match["file"]}"', lock)
    lock = _METADATA_TABLE.sub("", lock)
    return lock.rstrip("\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="FILE", help="exit with 1 if FILE is not in portable form")
    args = parser.parse_args()
    if args.check is None:
        sys.stdin.reconfigure(encoding="utf-8", newline="")
        sys.stdout.reconfigure(encoding="utf-8", newline="")
        sys.stdout.write(portable(sys.stdin.read()))
        return 0
    try:
        with open(args.check, encoding="utf-8", newline="") as file:
            lock = file.read()
    except OSError as error:
        parser.error(f"--check: {args.check} cannot be read ({error.strerror})")
    if lock != portable(lock) or "://" in lock:
        print(
            "the lock file names download hosts: set the filter up as CONTRIBUTING.md says, then run "
            "`git add --renormalize uv.lock`",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
