"""Numbers that are functions of names: fixed, uniform, independent."""

import pytest
import torch

from nextflow.sequence.draws import seed_of, uniforms


def test_names_have_seeds_of_their_own_and_keep_them() -> None:
    seeds = {seed_of(seed, step, key) for seed in range(3) for step in range(50) for key in ("a", "b", "ab")}
    assert len(seeds) == 450
    assert seed_of(1, "23") != seed_of("1", "23") != seed_of(12, "3")
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert seed_of(0, 7, "cat/0.png") == -1209890764203094784  # in every process, today and tomorrow


def test_numbers_are_uniform_and_do_not_depend_on_their_neighbours() -> None:
    seed_B = torch.tensor([seed_of(0, name) for name in range(200)])
    uniform_BN = uniforms(seed_B, 100)
    assert uniform_BN.mean() == pytest.approx(0.5, abs=0.01) and uniform_BN.var() == pytest.approx(1 / 12, abs=0.003)
    assert uniform_BN.min() > 0 and uniform_BN.max() < 1 and len(uniform_BN.unique()) == 20_000
    assert torch.equal(uniforms(seed_B[7:9], 10), uniform_BN[7:9, :10])
