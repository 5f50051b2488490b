"""Two processes with half of the batch each do to the quantiser what one process does with the whole batch."""

import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("quantizer_ranks.py")
# Sums over a batch are added up in another order: a few units in the last place of fp32, and what steps make of them.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def runs(two_ranks, tmp_path_factory):
    """Results of one process, of rank 0 and of rank 1."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor() as pool:
        two = pool.submit(two_ranks, SCRIPT, folder)
        one = runpy.run_path(str(SCRIPT))["main"]()
    return one, *two.result()


@pytest.mark.parametrize("case", ["", ", first entries", ", kept pixel codebook"])
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_two_processes_equal_one(runs, update, case):
    one, *ranks = (run[f"{update}{case}"] for run in runs)
    for step, whole in enumerate(one["steps"]):
        halves = [rank["steps"][step] for rank in ranks]
        assert torch.equal(torch.cat([half["codes"] for half in halves]), whole["codes"])
        torch.testing.assert_close(torch.stack([half["losses"] for half in halves]).mean(0), whole["losses"], **CLOSE)
        torch.testing.assert_close(torch.cat([half["gradient"] for half in halves]), whole["gradient"], **CLOSE)
        for half in halves:
            assert torch.equal(half["changed"], whole["changed"])  # the same entries start, die and are revived,
            torch.testing.assert_close(half["entries"], whole["entries"], **CLOSE)  # to the same vectors
            torch.testing.assert_close(half["usage"], whole["usage"], **CLOSE)
    for name, value in one["state"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["state"][name], value, **CLOSE)


def test_draws_are_bitwise_those_of_one_process(runs):
    one, *ranks = (run["draw"] for run in runs)
    assert torch.equal(torch.cat([rank["keys"] for rank in ranks]), one["keys"])
    for name in ("best", "more than there are", "of each"):
        assert all(torch.equal(rank[name], one[name]) for rank in ranks), name


def test_entries_are_revived_in_these_runs(runs):
    steps = runs[0]["gradient"]["steps"]
    revived = [step["changed"].sum().item() for step in steps]
    assert revived[0] == 64  # first entries
    assert revived[1] == revived[3] == revived[5] == 0  # the interval is 2
    assert 0 < revived[2] < 64 and 0 < revived[4] < 64


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_ranks_with_other_grids_and_batch_sizes_keep_equal_codebooks(runs, update):
    _, first, second = (run[f"{update}, buckets"] for run in runs)
    for name, value in first["state"].items():
        assert torch.equal(second["state"][name], value), name
    for ours, theirs in zip(first["steps"], second["steps"]):
        assert torch.equal(ours["changed"], theirs["changed"]) and torch.equal(ours["usage"], theirs["usage"])
        assert ours["codes"].shape != theirs["codes"].shape
