"""How the GPUs of this machine are connected, and what that means for training on several of them.

The matrix that `nvidia-smi topo -m` prints names the kind of connection of every pair of GPUs. A GPU pair that talks
through the CPUs' interconnect exchanges gradients at a small part of the speed of NVLink.
"""

import re
import subprocess
from typing import NamedTuple

# From the fastest to the slowest, with what each means in the legend of nvidia-smi.
_KINDS = {
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "the PCIe bridge of a CPU",
    "NODE": "several PCIe bridges of a CPU",
    "SYS": "the interconnect between two CPUs",
}
_RANK = {kind: rank for rank, kind in enumerate(_KINDS)}
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Link(NamedTuple):
    """The connection of a pair of GPUs.

    Attributes:
        first: Index of one GPU.
        second: Index of the other, larger one.
        kind: NV, PIX, PXB, PHB, NODE or SYS.
        lanes: Number of NVLinks; 0 for other kinds.
    """

    first: int
    second: int
    kind: str
    lanes: int


def parse_matrix(text: str) -> list[Link]:
    """Return the links between GPUs in the output of `nvidia-smi topo -m`.

    Args:
        text: The output, colours or none; network cards, affinities and the legend are passed over.

    Raises:
        ValueError: If the output has GPUs but an entry is of no known kind.
    """
    rows = [line.split() for line in _ESCAPES.sub("", text).splitlines()]
    gpus = next((sum(name.startswith("GPU") and name[3:].isdigit() for name in row) for row in rows if row), 0)
    links = []
    for row in rows:
        if len(row) <= gpus or not re.fullmatch(r"GPU\d+", row[0]) or row[1].startswith("GPU"):
            continue
        first = int(row[0][3:])
        for second, entry in enumerate(row[1 : gpus + 1]):
            if second > first:
                links.append(_link(first, second, entry))
    return links


def _link(first: int, second: int, entry: str) -> Link:
    kind, lanes = re.fullmatch(r"([A-Z]+?)(\d*)", entry).groups() if re.fullmatch(r"[A-Z]+\d*", entry) else ("", "")
    if kind not in _KINDS:
        raise ValueError(f"nvidia-smi topo -m: {entry!r} between GPU{first} and GPU{second} is of no known kind")
    return Link(first, second, kind, int(lanes or 0))


def verdict(links: list[Link]) -> str:
    """Return a sentence on what the slowest link among the GPUs means; it sets the pace of every gradient exchange."""
    if not links:
        return "One GPU: nothing is exchanged."
    worst = max(links, key=lambda link: (_RANK[link.kind], -link.lanes))
    pair = f"GPU{worst.first} and GPU{worst.second}"
    if worst.kind == "NV":
        return f"All GPUs are connected by NVLink (at least {worst.lanes} links a pair): any strategy will do."
    if worst.kind in ("PIX", "PXB"):
        return f"{pair} talk through {_KINDS[worst.kind]}: ddp will do, sharded strategies wait for weights."
    return (
        f"{pair} talk through {_KINDS[worst.kind]}: gradients go through the memory of the CPU. Unless the model is "
        "small against its batch, one GPU, or a larger train.global_batch_size by accumulation, may be faster."
    )


def nccl_advice(links: list[Link]) -> dict[str, str]:
    """Return environment variables for NCCL that suit the links; empty where its own choice is right."""
    if any(link.kind in ("NODE", "SYS") for link in links) and not any(link.kind == "NV" for link in links):
        # Peer-to-peer copies across CPUs are often slower than through shared memory, and hang on some boards.
        return {"NCCL_P2P_LEVEL": "PHB"}
    return {}


def report(text: str) -> list[str]:
    """Return lines for people on the output of `nvidia-smi topo -m`."""
    links = parse_matrix(text)
    kinds: dict[str, list[str]] = {}
    for link in links:
        name = f"{_KINDS[link.kind]}{f' x{link.lanes}' if link.lanes else ''}"
        kinds.setdefault(name, []).append(f"{link.first}-{link.second}")
    lines = [f"GPU pairs through {name}: {', '.join(pairs)}" for name, pairs in kinds.items()]
    advice = " ".join(f"{name}={value}" for name, value in nccl_advice(links).items())
    return [*lines, verdict(links), *([f"Worth a try: {advice}"] if advice else [])]


def read_matrix() -> str | None:
    """Return what `nvidia-smi topo -m` prints here, or None if it does not run."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
