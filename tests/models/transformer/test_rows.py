"""Weights by rows: every share of a parameter is drawn and read as the whole is."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from nextflow.models.transformer.rows import copy_rows, draw_rows
from nextflow.models.transformer.state_dict import Stacked


@pytest.fixture
def share():
    """`share(rank)` is rank's part of a matrix of 2,500 rows in three shards, by torch's own rule, with nobody to talk to."""

    def of(rank):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        mesh = init_device_mesh("cpu", (3,))
        rows = len(torch.empty(2500).chunk(3)[rank])
        return DTensor.from_local(torch.zeros(rows, 4), mesh, [Shard(0)], shape=(2500, 4), stride=(4, 1))

    yield of
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_share_is_drawn_and_read_as_the_whole(share, rank):
    whole, part = torch.empty(2500, 4), share(rank)
    draw_rows(whole, 0.5, 3, "head.weight")
    draw_rows(part, 0.5, 3, "head.weight")
    assert torch.equal(part.to_local(), whole.chunk(3)[rank])
    assert 0.48 < float(whole.std()) < 0.52 and len(whole[:, 0].unique()) > 2400

    # q, k and v on top of each other, of which the first 2,000 rows count
    stacked = Stacked(tuple(torch.randn(height, 4) for height in (1500, 600, 400)), 2000)
    expected = torch.cat((torch.cat(stacked.parts)[:2000], whole[2000:]))
    copy_rows(part, stacked)
    assert torch.equal(part.to_local(), expected.chunk(3)[rank])
    copy_rows(whole, stacked)
    assert torch.equal(whole, expected)
