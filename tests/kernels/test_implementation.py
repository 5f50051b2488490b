"""`auto` chooses by device and says so once; a name runs or raises."""

import logging

import pytest
import torch

from nextflow.kernels import implementation
from nextflow.kernels.implementation import resolve


def test_auto_says_once_what_it_runs(caplog):
    implementation._say_once.cache_clear()
    with caplog.at_level(logging.INFO, "nextflow.kernels"):
        assert [resolve("rope", "auto", "cpu", "torch") for _ in range(3)] == ["torch"] * 3
    assert caplog.messages == ["rope: 'auto' runs 'torch' on cpu"]


def test_only_the_first_process_says_it(caplog, monkeypatch):
    implementation._say_once.cache_clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with caplog.at_level(logging.INFO, "nextflow.kernels"):
        resolve("rope", "auto", "cpu", "torch")
    assert not caplog.messages


def test_auto_is_triton_on_cuda_when_it_is_installed(monkeypatch):
    monkeypatch.setattr(implementation, "_has_triton", lambda: True)
    assert resolve("rope", "auto", "cuda", "torch") == resolve("rope", "triton", "cuda", "torch") == "triton"
    monkeypatch.setattr(implementation, "_has_triton", lambda: False)
    assert resolve("rope", "auto", "cuda", "torch") == "torch"
    with pytest.raises(ValueError, match="rope: 'triton' is not installed"):
        resolve("rope", "triton", "cuda", "torch")


def test_names_run_or_raise(monkeypatch):
    monkeypatch.setattr(implementation, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve("rope", "torch", "cpu", "torch") == "torch"
    with pytest.raises(ValueError, match="'triton' runs on CUDA, not on cpu"):
        resolve("rope", "triton", "cpu", "torch")
    with pytest.raises(ValueError, match="'fast' is none of"):
        resolve("rope", "fast", "cpu", "torch")


def test_a_compiled_function_does_not_break_for_the_choice():
    implementation._say_once.cache_clear()

    def double(x):
        return x * 2 if resolve("rope", "auto", x.device.type, "torch") == "torch" else x

    compiled = torch.compile(double, backend="eager", fullgraph=True)  # fullgraph: a break would raise
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
