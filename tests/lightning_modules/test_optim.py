"""The schedule is a pure function of the step; norms, biases and embeddings do not decay."""

import pytest
import torch
from torch import nn

from nextflow.lightning_modules.optim import parameter_groups, warmup_cosine


def test_warmup_then_half_a_cosine():
    factors = [warmup_cosine(step, warmup_steps=4, total_steps=14) for step in range(16)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.5)
    assert factors[14] == factors[15] == pytest.approx(0.0)
    assert warmup_cosine(0, warmup_steps=0, total_steps=5) == 1.0


def test_final_factor():
    assert warmup_cosine(10, warmup_steps=0, total_steps=10, final=0.1) == pytest.approx(0.1)
    assert {warmup_cosine(step, warmup_steps=0, total_steps=10, final=1.0) for step in range(20)} == {1.0}


def test_parameter_groups():
    module = nn.ModuleDict({"e": nn.Embedding(3, 2), "l": nn.Linear(2, 2), "n": nn.LayerNorm(2), "f": nn.Linear(2, 2)})
    module["f"].requires_grad_(False)
    groups = parameter_groups(module)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(module["l"].weight)}
    assert sum(len(group["params"]) for group in groups) == 5
