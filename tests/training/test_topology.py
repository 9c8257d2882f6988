"""Matrices as `nvidia-smi topo -m` prints them on real machines (some cut to their first rows), and what follows."""

import pytest

from litgpt_moe_ext.training.parallel.topology import Link, nccl_advice, parse_matrix, report, verdict

# Two consumer GPUs in one workstation, with the tabs and the underlined header of recent drivers.
WORKSTATION = (
    "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tPHB\t0-63\t0\t\tN/A\n"
    "GPU1\tPHB\t X \t0-63\t0\t\tN/A\n"
    "\nLegend:\n\n  X    = Self\n  NV#  = a bonded set of # links\n"
)

DESKTOP = """\
          GPU0 GPU1    CPU Affinity    NUMA Affinity   GPU NUMA ID
    GPU0  X      NODE    0-15    0               N/A
    GPU1 NODE     X      0-15    0               N/A
"""

# Eight GPUs on two CPUs and one network card; the first three rows.
SERVER = """\
        GPU0    GPU1    GPU2    GPU3    GPU4    GPU5    GPU6    GPU7    mlx4_0  CPU Affinity
GPU0     X      PIX     PHB     PHB     SYS     SYS     SYS     SYS     PHB     0-9,20-29
GPU1    PIX      X      PHB     PHB     SYS     SYS     SYS     SYS     PHB     0-9,20-29
GPU2    PHB     PHB      X      PIX     SYS     SYS     SYS     SYS     PHB     0-9,20-29
"""

# Sixteen GPUs on an NVSwitch; the first two rows, without some of the network cards.
SWITCHED = """\
        GPU0    GPU1    GPU2    GPU3    mlx5_0  mlx5_1  CPU Affinity
GPU0     X      NV6     NV6     NV6     PIX     SYS     0-23,48-71
GPU1    NV6      X      NV6     NV6     PIX     SYS     0-23,48-71
"""


def test_workstation():
    assert parse_matrix(WORKSTATION) == [Link(0, 1, "PHB", 0)]
    lines = report(WORKSTATION)
    assert lines[0] == "GPU pairs through the PCIe bridge of a CPU: 0-1"
    assert "one GPU, or a larger train.global_batch_size" in lines[1]


def test_desktop():
    links = parse_matrix(DESKTOP)
    assert links == [Link(0, 1, "NODE", 0)]
    assert nccl_advice(links) == {"NCCL_P2P_LEVEL": "PHB"}
    assert report(DESKTOP)[-1] == "Worth a try: NCCL_P2P_LEVEL=PHB"


def test_server_with_two_cpus():
    links = parse_matrix(SERVER)
    assert len(links) == 7 + 6 + 5
    assert {(link.first, link.second): link.kind for link in links}[0, 1] == "PIX"
    assert "GPU0 and GPU4 talk through the interconnect between two CPUs" in verdict(links)


def test_network_cards_are_not_gpus():
    links = parse_matrix(SWITCHED)
    assert {(link.kind, link.lanes) for link in links} == {("NV", 6)}
    assert len(links) == 5
    assert "NVLink (at least 6 links a pair)" in verdict(links)
    assert nccl_advice(links) == {}


def test_nothing_to_compare():
    assert parse_matrix("\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n") == []
    assert verdict([]) == "One GPU: nothing is exchanged."


def test_unknown_kind():
    with pytest.raises(ValueError, match="'WIFI' between GPU0 and GPU1"):
        parse_matrix(WORKSTATION.replace("PHB", "WIFI"))
