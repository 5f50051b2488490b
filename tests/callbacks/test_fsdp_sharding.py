"""The sharding callback refuses what cannot work, and says what to change. What it does is in test_sharding.py."""

import lightning as L
import pytest
import torch

from nextflow.callbacks.fsdp_sharding import FSDPSharding


def test_paths_of_classes_are_checked():
    with pytest.raises(ValueError, match=r"FSDPSharding.wrap: there is no class 'nextflow.models.Nothing'"):
        FSDPSharding(wrap=["nextflow.models.Nothing"])
    with pytest.raises(ValueError, match="full import path"):
        FSDPSharding(wrap=["Linear"])
    with pytest.raises(ValueError, match="is not an nn"):
        FSDPSharding(wrap=["torch.Tensor"])


def test_classes_that_do_not_occur_are_an_error():
    with pytest.raises(ValueError, match="Linear holds no Conv2d"):
        FSDPSharding(wrap=["torch.nn.Conv2d"]).shard(None, torch.nn.Linear(2, 2))


def test_another_strategy_is_an_error():
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"trainer.strategy: .*ModelParallelStrategy, not SingleDeviceStrategy"):
        FSDPSharding(wrap=["torch.nn.Linear"]).setup(trainer, L.LightningModule(), "fit")
