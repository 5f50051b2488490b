"""How many FLOPs per second a device could do at most: what MFU divides by."""

from __future__ import annotations

import re

import torch

# Makers' data sheets: dense products of 16-bit numbers, in TFLOPs per second. All words of a row stand in the device's name;
# the first row that fits counts. (Lightning's own table counts sparse products for some devices.)
PEAKS = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 150.0),
    ("RTX A6000", 155.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 4090", 165.0),
    ("RTX 3090", 71.0),
    ("MI300X", 1307.0),
    ("MI250X", 383.0),
)


def peak_teraflops(device_name: str) -> float | None:
    """Peak of a device in 16-bit products, None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, such as "NVIDIA H100 80GB HBM3".
    """
    words = set(re.findall(r"\w+", device_name.upper()))
    return next((peak for row, peak in PEAKS if words >= set(row.upper().split())), None)


def peak_of(device: torch.device) -> float | None:
    """The same for a device of this machine; None for a CPU."""
    return peak_teraflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
