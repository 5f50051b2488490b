"""What every test starts from: fixed seeds, float32, one thread, no network. (Two processes, and CI's cores, share well.)"""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before anything else
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run under its interpreter; it looks when a kernel is defined, so before any is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def uncounted() -> dict[Any, Callable[..., int]]:
    """Formulas of operations that torch's FLOPs counter does not know: the head's products in place, and in torch 2.14 and
    earlier the fused attention of a CPU."""
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    return {
        aten.addmm_: lambda out, left, right, **_: 2 * left[0] * left[1] * right[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def two_ranks() -> Callable[[Path, Path], list[Any]]:
    """`two_ranks(script, folder)` runs `python SCRIPT FOLDER` as both ranks of a run of two processes, as torchrun would.

    Rank r saves what it has to say to FOLDER/r.pt; both come back.
    """

    def run(script: Path, folder: Path) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(folder)],
                env={**os.environ, **where, "OMP_NUM_THREADS": "1", "NODE_RANK": "0", "RANK": rank, "LOCAL_RANK": rank},
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in ("0", "1")
        ]
        try:
            outputs = [process.communicate(timeout=600)[0] for process in processes]
        finally:
            for process in processes:  # one that failed leaves the other waiting
                process.kill()
        assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
        return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]

    return run
