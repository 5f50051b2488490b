"""Which implementation of a kernel runs, by names that mean the same for all of them.

    auto        triton on CUDA where it is installed, elsewhere the one that runs on any device
    triton      CUDA, or anywhere under Triton's interpreter
    reference   the definition, `NAME_ref`, to compare with

and one name for what runs on any device: "chunked" where it works in pieces, "torch" where it is an op of torch or a few.
`auto` says once per kernel what it chose, on the logger `nextflow.kernels` at level INFO. A name that is asked for runs or
raises; nothing falls back silently.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch

log = logging.getLogger("nextflow.kernels")


def resolve(kernel: str, implementation: str, device_type: str, anywhere: str) -> str:
    """The implementation that runs.

    Args:
        kernel: name for messages, such as "rms_norm".
        implementation: "auto", `anywhere`, "triton" or "reference".
        device_type: type of the device that the tensors are on.
        anywhere: the kernel's name for what runs on any device.

    Raises:
        ValueError: `implementation` is unknown or cannot run there.
    """
    if implementation == "auto":
        chosen = "triton" if device_type == "cuda" and _has_triton() else anywhere
        announce(kernel, chosen, device_type)
        return chosen
    if implementation == "triton":
        if not _has_triton():
            raise ValueError(f"{kernel}: 'triton' is not installed; pip install triton, or use 'auto' or {anywhere!r}")
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"{kernel}: 'triton' runs on CUDA, not on {device_type}; use 'auto' or {anywhere!r} "
                "(TRITON_INTERPRET=1, set before Python starts, runs it slowly anywhere)"
            )
    elif implementation not in (anywhere, "reference"):
        raise ValueError(f"{kernel}: {implementation!r} is none of 'auto', {anywhere!r}, 'triton', 'reference'")
    return implementation


# Compiled code takes the results of these for constants, so it says what it runs while it is traced, and never breaks for it.
@torch.compiler.assume_constant_result
def announce(kernel: str, chosen: str, device_type: str) -> None:
    """Say which implementation `auto` chose, the first time it is chosen, on the first process alone."""
    if os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0":
        _say_once(f"{kernel}: 'auto' runs {chosen!r} on {device_type}")


@cache
def _say_once(message: str) -> None:
    log.info(message)


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return _is_installed("triton")


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
