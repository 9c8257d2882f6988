"""How kernels are started."""

from litgpt_moe_ext.kernels.launch import launch


def test_an_empty_grid_starts_nothing():
    """CUDA refuses one."""
    launch(None, (3, 0), (), warps=4)
