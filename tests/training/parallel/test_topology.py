"""Matrices as `nvidia-smi topo -m` prints them on real machines (some cut to their first rows), and what follows."""

from litgpt_moe_ext.training.parallel.topology import Link, parse_matrix, report

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
    assert report(DESKTOP)[-1] == "Worth a try: NCCL_P2P_LEVEL=PHB"
    assert "NCCL_P2P_LEVEL" not in report(DESKTOP.replace("NODE", "PHB "))[-1], "as it is by itself"


def test_server_with_two_cpus():
    links = parse_matrix(SERVER)
    assert len(links) == 7 + 6 + 5
    assert {(link.first, link.second): link.kind for link in links}[0, 1] == "PIX"
    assert "GPU0 and GPU4 talk through the interconnect between two CPUs" in report(SERVER)[-2]


def test_bridged_pairs_on_two_cpus():
    """Copies between GPUs work there: that much is known where some have NVLinks."""
    bridged = SERVER.replace("PIX", "NV4").replace("PHB", "SYS")
    lines = report(bridged)
    assert "GPU0 and GPU2 talk through the interconnect between two CPUs" in lines[-1]
    assert "NCCL_P2P_LEVEL" not in lines[-1]


def test_network_cards_are_not_gpus():
    links = parse_matrix(SWITCHED)
    assert {(link.kind, link.lanes) for link in links} == {("NV", 6)}
    assert len(links) == 5
    assert report(SWITCHED)[-1] == "At least 6 NVLinks between any two GPUs: any strategy will do."


def test_nothing_to_compare():
    assert report("\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n") == []
    assert report("") == []


def test_words_that_are_not_known():
    """N/A on virtual GPUs, and whatever comes: the report is for information, and ends no run."""
    for word in ("N/A", "OK", "C2C", "SOC", "nv4"):
        assert report(WORKSTATION.replace("PHB", word)) == []
    links = parse_matrix(SERVER.replace("PHB", "N/A"))
    assert {link.kind for link in links} == {"PIX", "SYS"}


def test_the_fewest_links_count():
    lines = report(SWITCHED.replace("NV6     NV6     NV6", "NV6     NV2     NV6"))
    assert lines[-1] == "At least 2 NVLinks between any two GPUs: any strategy will do."
