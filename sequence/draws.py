"""Random numbers that are functions of names (a seed, a step, a key): equal on every device and rank, and after a resume.

Nothing is drawn from a generator, so nothing has to be stored, and the order in which numbers are asked for does not matter.

B names, N numbers of each.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_of(*names: int | str) -> int:
    """A signed 64-bit number that stands for these names; other names give another."""
    text = "\n".join(map(repr, names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def uniforms(seed_B: Tensor, count: int) -> Tensor:
    """float64 [B, count] in the open interval (0, 1): `count` numbers of each int64 seed, on its device."""
    hash_BN = mix(mix(seed_B)[:, None] + torch.arange(count, device=seed_B.device))
    return (_shifted(hash_BN, 11).double() + 0.5) * 2.0**-53  # 53 of the 64 bits


def mix(x: Tensor) -> Tensor:
    """Spreads every bit of an int64 over all others (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = x - 7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number: 0 must not stay 0
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left; torch's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
