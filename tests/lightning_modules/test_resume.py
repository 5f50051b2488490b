"""Interrupted == straight with everything at once: curriculum, mixture, workers, average, sharding, new processes."""

import runpy

import pytest


@pytest.fixture(scope="module")
def benchmark(root):
    return runpy.run_path(str(root / "benchmarks" / "resume.py"))


def test_resumed_runs_end_where_straight_ones_do(benchmark, tmp_path):
    """Two of the cells of `benchmarks/resume.py`, each cut off where a stage ends and inside of one."""
    cells = [benchmark["Cell"].parse(words) for words in ("1 single 2", "2 fsdp2 3")]
    results = benchmark["compare"](tmp_path, cells)
    assert len(results) == 4
    for (cell, cut), found in results.items():
        assert set(found) == {"weights", "average", "optimiser", "steps"}
        assert not any(found.values()), (cell, cut, found)


def test_cells_that_do_not_exist_are_refused(benchmark):
    with pytest.raises(ValueError, match=r"--cells 1 ddp 0: strategies by number of processes are"):
        benchmark["Cell"].parse("1 ddp 0")
