"""SIGTERM, Ctrl-C, kill -9 while a checkpoint is written, a full disk: the last checkpoint is whole and resumed from."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("interrupted_run.py")


def start(folder, *words):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def step_and_weight(folder):
    state = torch.load(folder / "last.ckpt", weights_only=False)
    return state["global_step"], float(state["state_dict"]["layer.weight"].mean())


def goes_on(folder, **options):
    """To the end of the run, leaving nothing behind but the checkpoint; of shards, the folder that the link names."""
    assert runpy.run_path(str(SCRIPT))["main"](folder, "", resume="last", **options) == 6
    last = folder / "last.ckpt"
    assert {path.name for path in folder.iterdir()} - {"ready"} == {last.name, last.resolve().name}


@pytest.mark.parametrize(("what", "number"), [("sigterm", signal.SIGTERM), ("ctrl-c", signal.SIGINT)])
def test_a_signal_saves_the_step_under_way(tmp_path, what, number):
    run = start(tmp_path, what)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 128 + number, output
    assert step_and_weight(tmp_path) == (4, 4.0)
    assert f"{number.name}: saved step 4" in output and "--ckpt_path last" in output
    goes_on(tmp_path)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    run = start(tmp_path, "twice")
    output = run.communicate(timeout=120)[0]
    assert run.returncode and "Ctrl-C again ends at once" in output, output
    assert step_and_weight(tmp_path) == (2, 2.0)


def test_killed_while_writing(tmp_path):
    run = start(tmp_path, "kill")
    deadline = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.kill()
    output = run.communicate()[0]
    assert (tmp_path / "last.ckpt.saving").exists(), output
    assert step_and_weight(tmp_path) == (2, 2.0)
    goes_on(tmp_path)


@pytest.mark.parametrize("words", [(), ("shards",)])
def test_a_full_disk(tmp_path, words):
    """A limit of the size of files stands for it: writing fails in the middle, with the system's error."""
    run = start(tmp_path, "full", *words)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 1
    assert "the checkpoint of step 4 could not be written" in output, output
    assert "last.ckpt is the one before and whole" in output and "--ckpt_path last" in output
    assert not (tmp_path / "last.ckpt.saving").exists()
    if not words:
        assert "File too large" in output
        assert step_and_weight(tmp_path) == (2, 2.0)
        goes_on(tmp_path)
    else:
        assert (tmp_path / "last.ckpt").is_symlink() and (tmp_path / "last.ckpt" / ".metadata").is_file()
        goes_on(tmp_path, shards=True)
        torch.distributed.destroy_process_group()
