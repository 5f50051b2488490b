"""Peaks are found by the names that drivers give."""

import pytest
import torch

from nextflow.callbacks.device_peak import peak_of, peak_teraflops


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A6000", 155),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA A10G", None),
        ("Quadro P4000", None),
    ],
)
def test_devices_are_known_by_their_names(name, expected):
    assert peak_teraflops(name) == expected


def test_a_cpu_has_no_peak():
    assert peak_of(torch.device("cpu")) is None
