"""GRPO on two sharded processes (FSDP2) == on one, also where the answers of one rank take more steps to decode."""

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("grpo_ranks.py")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The files of test_grpo.py's fixture."""
    tests = runpy.run_path(str(SCRIPT))["one_process_tests"]()
    folder = tmp_path_factory.mktemp("ranks")
    tests.write_models(folder)
    return folder


def test_two_processes_equal_one(two_ranks, start):
    two = two_ranks(SCRIPT, start)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: other rounding may draw another code, and all that follows differs
    try:
        one = runpy.run_path(str(SCRIPT))["run"](str(start))
    finally:
        torch.set_num_threads(threads)
    assert all(rank["sharded"] for rank in two) and not one["sharded"]
    for rank in two:
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-4, atol=2e-5, msg=name)
        assert rank["logs"]["grpo/reward"] == pytest.approx(one["logs"]["grpo/reward"], abs=1e-5)
        assert rank["logs"]["grpo/grad_norm"] == pytest.approx(one["logs"]["grpo/grad_norm"], rel=1e-3)
        assert rank["logs"]["grpo/sampling/sampling_logp_difference/mean"] < 1e-5
