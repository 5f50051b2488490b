"""GRPO on two sharded processes (FSDP2) == on one, also where the answers of one rank take more steps to decode."""

from pathlib import Path

import pytest
import torch

from nextflow.tests.lightning_modules import grpo_ranks
from nextflow.tests.lightning_modules.tiny_grpo import write_models


@pytest.fixture(scope="module")
def runs(two_ranks, tmp_path_factory):
    """Results of ranks 0 and 1 of two processes, and of one process."""
    folder = tmp_path_factory.mktemp("ranks")
    write_models(folder)
    two = two_ranks(Path(grpo_ranks.__file__), folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: other rounding may draw another code, and all that follows differs
    try:
        return two, grpo_ranks.main(str(folder))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("part", ["whole", "resumed"])
def test_two_processes_equal_one(runs, part):
    """`resumed`: prefixes and suffixes in turn, interrupted between them and gone on with from the checkpoint."""
    two, one = [rank[part] for rank in runs[0]], runs[1][part]
    assert all(rank["sharded"] for rank in two) and not one["sharded"]
    for rank in two:
        for name, value in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], value, rtol=1e-4, atol=2e-5, msg=name)
        assert rank["logs"]["grpo/reward"] == pytest.approx(one["logs"]["grpo/reward"], abs=1e-5)
        assert rank["logs"]["grpo/grad_norm"] == pytest.approx(one["logs"]["grpo/grad_norm"], rel=1e-3)
        assert rank["logs"]["grpo/sampling/sampling_logp_difference/mean"] < 1e-5
