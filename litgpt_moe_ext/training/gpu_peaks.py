"""What GPUs compute at best, by their names."""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """TFLOP/s of dense products: operands in 16 bits (added up in 32), in TF32, in float32 without Tensor Cores."""

    half: float
    tf32: float
    single: float


# By words of the name that CUDA gives the device, from NVIDIA's data sheets. (Lightning 2.6's table, which LitGPT's
# `device/mfu` comes from, has figures with sparsity for H200 and H100 NVL, and those without Tensor Cores for others.)
_DATA_CENTRE = {
    "GB300": Peak(2500.0, 1250.0, 80.0),
    "GB200": Peak(2500.0, 1250.0, 80.0),
    "B300": Peak(2250.0, 1125.0, 75.0),
    "B200": Peak(2250.0, 1125.0, 75.0),
    "GH200": Peak(989.4, 494.7, 66.9),
    "H200": Peak(989.4, 494.7, 66.9),
    "H100 NVL": Peak(835.5, 417.5, 60.0),
    "H100 PCIe": Peak(756.0, 378.0, 51.2),
    "H100": Peak(989.4, 494.7, 66.9),
    "H800": Peak(989.4, 494.7, 66.9),
    "H20": Peak(148.0, 74.0, 44.0),
    "A100": Peak(312.0, 156.0, 19.5),
    "A800": Peak(312.0, 156.0, 19.5),
    "A30": Peak(165.0, 82.0, 10.3),
    "A40": Peak(149.7, 74.8, 37.4),
    "A10G": Peak(70.0, 35.0, 35.0),
    "A10": Peak(125.0, 62.5, 31.2),
    "RTX A6000": Peak(154.8, 77.4, 38.7),
    "RTX 6000 Ada": Peak(364.2, 182.1, 91.1),
    "L40S": Peak(362.0, 183.0, 91.6),
    "L40": Peak(181.0, 90.5, 90.5),
    "L4": Peak(121.0, 60.0, 30.3),
    "T4": Peak(65.0, 8.1, 8.1),
}
# Streaming multiprocessors and boost clock in GHz. On GeForce a product in 16 bits that is added up in 32 runs at half
# the rate that is advertised: 512 operations per multiprocessor and cycle, in all generations since Turing.
_GEFORCE = {
    "RTX 5090": (170, 2.407),
    "RTX 5080": (84, 2.617),
    "RTX 5070 Ti": (70, 2.452),
    "RTX 5070": (48, 2.512),
    "RTX 5060 Ti": (36, 2.572),
    "RTX 5060": (30, 2.497),
    "RTX 4090 D": (114, 2.520),
    "RTX 4090": (128, 2.520),
    "RTX 4080 SUPER": (80, 2.550),
    "RTX 4080": (76, 2.505),
    "RTX 4070 Ti SUPER": (66, 2.610),
    "RTX 4070 Ti": (60, 2.610),
    "RTX 4070 SUPER": (56, 2.475),
    "RTX 4070": (46, 2.475),
    "RTX 4060 Ti": (34, 2.535),
    "RTX 4060": (24, 2.460),
    "RTX 3090 Ti": (84, 1.860),
    "RTX 3090": (82, 1.695),
    "RTX 3080 Ti": (80, 1.665),
    "RTX 3080": (68, 1.710),
    "RTX 3070 Ti": (48, 1.770),
    "RTX 3070": (46, 1.725),
    "RTX 3060 Ti": (38, 1.665),
    "RTX 3060": (28, 1.777),
}
_TURING = {
    "RTX 2080 Ti": (68, 1.545),
    "RTX 2080 SUPER": (48, 1.815),
    "RTX 2080": (46, 1.710),
    "RTX 2070 SUPER": (40, 1.770),
    "RTX 2070": (36, 1.620),
    "RTX 2060 SUPER": (34, 1.650),
    "RTX 2060": (30, 1.680),
}


def _from_clock(multiprocessors: int, ghz: float, turing: bool) -> Peak:
    half = round(multiprocessors * ghz * 512 / 1000, 1)
    return Peak(half, half / 4, half / 4) if turing else Peak(half, half / 2, half / 2)


# The first whose words are all in the name counts. Turing has no bfloat16 and no TF32.
_PEAKS = {
    **_DATA_CENTRE,
    **{name: _from_clock(*chip, turing=False) for name, chip in _GEFORCE.items()},
    **{name: _from_clock(*chip, turing=True) for name, chip in _TURING.items()},
}
_FLOAT16_ONLY = ("T4", *_TURING)


def peak_flops(device: str, precision: str, float32: str) -> float | None:
    """Return the floating point operations per second of a GPU in dense matrix products, or None if they are unknown.

    Args:
        device: Its name, as from `torch.cuda.get_device_name`.
        precision: Of the training, as Fabric names it: 32-true, bf16-mixed, ...
        float32: In what float32 is multiplied, `ieee` or `tf32`.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    name = next((name for name in _PEAKS if set(name.split()) <= words), None)
    # Chips of laptops have the names of others and clocks that depend on the laptop, and MIG gives a part of a chip.
    if name is None or words & {"Laptop", "Max", "MIG"} or (precision.startswith("bf16") and name in _FLOAT16_ONLY):
        return None
    peak = _PEAKS[name]
    if precision.startswith(("bf16", "16")):
        return 1e12 * peak.half
    return 1e12 * (peak.single if float32 == "ieee" else peak.tf32)
