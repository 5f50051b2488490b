"""Interrupted == straight with everything at once: curriculum, mixture, workers, average, sharding.

Two of the cells of `benchmarks/resume.py`, each cut off where a stage ends and inside of one.
"""

import runpy

import pytest


@pytest.fixture(scope="module")
def benchmark(root):
    return runpy.run_path(str(root / "benchmarks" / "resume.py"))


def nothing_differs(results):
    for where, found in results.items():
        assert set(found) == {"weights", "average", "optimiser", "steps"}
        assert not any(found.values()), (where, found)


def test_two_sharded_ranks_with_three_workers_go_on_in_new_processes(benchmark, tmp_path):
    results = benchmark["compare"](tmp_path, [benchmark["Cell"].parse("2 fsdp2 3")])
    assert {cut for _, cut in results} == {"boundary", "inside"}
    nothing_differs(results)


def test_one_device_with_two_workers(benchmark, tmp_path):
    cell = benchmark["Cell"].parse("1 single 2")
    benchmark["prepare"](tmp_path)
    for phase in ("straight", "resumed"):
        benchmark["run_all"](tmp_path, [cell], phase)
    nothing_differs({cut: benchmark["differences"](tmp_path, cell, cut) for cut in ("boundary", "inside")})


def test_cells_that_do_not_exist_are_refused(benchmark):
    with pytest.raises(ValueError, match=r"--cells 1 ddp 0: strategies by number of processes are"):
        benchmark["Cell"].parse("1 ddp 0")
