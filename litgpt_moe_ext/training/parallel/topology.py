"""How the GPUs of this machine are connected, and what that means for training on several of them.

`nvidia-smi topo -m` prints the connection of every pair of GPUs. A pair connected through the CPUs' interconnect
exchanges gradients at a small fraction of NVLink's speed.
"""

import re
import subprocess
from typing import NamedTuple

# From fastest to slowest, with nvidia-smi's legend. Other values, such as N/A on virtual GPUs, are unknown.
_KINDS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the PCIe bridge of a CPU",
    "NODE": "several PCIe bridges of a CPU",
    "SYS": "the interconnect between two CPUs",
}
_SPEED = list(_KINDS)
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_GPU = re.compile(r"GPU(\d+)")
_ENTRY = re.compile(rf"({'|'.join(_KINDS)})(\d*)")


class Link(NamedTuple):
    """The connection of a pair of GPUs, by their indices; `lanes` is the number of NVLinks, 0 for other kinds."""

    first: int
    second: int
    kind: str
    lanes: int


def parse_matrix(text: str) -> list[Link]:
    """Return the links of known kind in the output of `nvidia-smi topo -m`, with colours or without."""
    rows = [line.split() for line in _ESCAPES.sub("", text).splitlines()]
    gpus = next((sum(_GPU.fullmatch(name) is not None for name in row) for row in rows if row), 0)
    links = []
    for row in rows:
        # The header starts with two GPUs, a row of the matrix with one.
        if len(row) <= gpus or not (name := _GPU.fullmatch(row[0])) or _GPU.fullmatch(row[1]):
            continue
        for second, entry in enumerate(row[1 : gpus + 1]):
            if second > int(name[1]) and (kind := _ENTRY.fullmatch(entry)):
                links.append(Link(int(name[1]), second, kind[1], int(kind[2] or 0)))
    return links


def report(text: str) -> list[str]:
    """Return lines for people on the output of `nvidia-smi topo -m`; none if it says nothing about GPU pairs.

    The slowest link sets the pace of every exchange of gradients.
    """
    links = parse_matrix(text)
    if not links:
        return []
    pairs: dict[str, list[str]] = {}
    for link in links:
        name = f"{_KINDS[link.kind]}{f' x{link.lanes}' if link.lanes else ''}"
        pairs.setdefault(name, []).append(f"{link.first}-{link.second}")
    lines = [f"GPU pairs through {name}: {', '.join(them)}" for name, them in pairs.items()]
    worst = max(links, key=lambda link: (_SPEED.index(link.kind), -link.lanes))
    pair = f"GPU{worst.first} and GPU{worst.second} talk through {_KINDS[worst.kind]}"
    if worst.kind == "NV":
        return [*lines, f"At least {worst.lanes} NVLinks between any two GPUs: any strategy will do."]
    if worst.kind in ("PIX", "PXB"):
        return [*lines, f"{pair}: ddp will do, sharded strategies wait for weights."]
    lines.append(
        f"{pair}: gradients go through the memory of the CPU. Unless the model is small against its batch, one GPU, or "
        "a larger train.global_batch_size by gradient accumulation, may be faster."
    )
    if worst.kind in ("NODE", "SYS") and not any(link.kind == "NV" for link in links):
        # Peer-to-peer copies across CPUs are often slower than through shared memory, and hang on some boards.
        lines.append("Worth a try: NCCL_P2P_LEVEL=PHB")
    return lines


def read_matrix() -> str | None:
    """Return what `nvidia-smi topo -m` prints here, or None if it does not run."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, errors="replace", timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
