"""Whether all processes of a run have the same settings, code and data, which those of several nodes may not.

With two learning rates, for example, the weights of the ranks would drift apart without a word, and with two lengths
one rank would wait for the other.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from litgpt_moe_ext.training.checkpoint.changes import flat, shown
from litgpt_moe_ext.training.parallel.agreement import refuse_together

# The launcher decides the first two, and the first rank alone what to resume from and whether to show a bar. It alone
# logs, too, and a name in `log` may be the time at which a node was started.
_FREE = {"devices", "num_nodes", "resume", "progress"}
_FREE_SECTIONS = ("log.",)
# A node may have the same files under another path.
_PATHS = ("_dir", "_path", ".hellaswag", ".tasks")


def require_same(fabric: Any, settings: Mapping[str, Any], software: str) -> None:
    """Raise SettingsError on every rank unless all have the settings and the code of the first one.

    Args:
        fabric: The launched fabric; every rank must call this.
        settings: Settings of the run, as plain data.
        software: The code of this rank, as `software.software` describes it.
    """
    own = (dict(settings), software)
    first = fabric.broadcast(own)
    refuse_together(fabric, differences(own, first, fabric.global_rank))


def require_same_data(fabric: Any, corpora: Iterable[str]) -> None:
    """Raise SettingsError on every rank unless all have the corpora of the first one.

    Args:
        fabric: The launched fabric; every rank must call this.
        corpora: Keys of the corpora of this rank.
    """
    own = sorted(corpora)
    first = fabric.broadcast(own)
    problem = (
        f"data: rank {fabric.global_rank} has the corpus {' and '.join(own)}, but rank 0 has {' and '.join(first)}; "
        "copy the same files to all nodes, or put them on a disk that all see"
    )
    refuse_together(fabric, [] if own == first else [problem])


def differences(own: tuple[Mapping[str, Any], str], first: tuple[Mapping[str, Any], str], rank: int) -> Iterator[str]:
    """Yield a message for everything in which a rank differs from the first.

    Args:
        own: Its settings and its code.
        first: Those of the first rank.
        rank: Its number.
    """
    here, there = flat(own[0]), flat(first[0])
    for name in dict.fromkeys((*there, *here)):
        one, other = here.get(name), there.get(name)
        if name.endswith(_PATHS):
            one, other = one and "a path", other and "a path"
        if one != other and name not in _FREE and not name.startswith(_FREE_SECTIONS):
            yield (
                f"{name}: {shown(one)} on rank {rank} must be {shown(other)}, as on rank 0; start all nodes with "
                "the same recipe and flags"
            )
    if _is_other_code(own[1], first[1]):
        yield f"software: {own[1]} on rank {rank} must be {first[1]}, as on rank 0; install the same on all nodes"


def _is_other_code(own: str, first: str) -> bool:
    # A node without git knows no commit.
    if (", commit " in own) != (", commit " in first):
        own, first = _without_commit(own), _without_commit(first)
    return own != first


def _without_commit(software: str) -> str:
    return ", ".join(part for part in software.split(", ") if not part.startswith("commit "))
