"""One stage is one epoch: loaders, total steps, and errors that say what to set."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from nextflow.callbacks.resolution_curriculum import ResolutionCurriculum, Stage

STAGES = [Stage(level=32, num_batches=3), Stage(level=64, num_batches=2, alpha=0.9, batch_size=1)]


class Data(L.LightningDataModule):
    stages = None

    def train_dataloader(self):
        stage = self.stages[self.trainer.current_epoch]
        return torch.utils.data.DataLoader([stage.level] * stage.num_batches, batch_size=None)


class Module(L.LightningModule):
    total_steps = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.levels = []

    def training_step(self, level, index):
        self.levels.append(int(level))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**changes):
    options = {
        "max_epochs": 2, "reload_dataloaders_every_n_epochs": 1, "logger": False, "enable_checkpointing": False,
        "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [ResolutionCurriculum(STAGES)],
    }  # fmt: skip
    return L.Trainer(**{**options, **changes})


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 5), (2, 3)])
def test_stages_follow_epochs_and_set_the_schedule(accumulate, steps):
    module = Module()
    run = trainer(accumulate_grad_batches=accumulate)
    run.fit(module, datamodule=Data())
    assert module.levels == [32, 32, 32, 64, 64]
    assert module.total_steps == run.global_step == steps


def test_max_steps_bounds_the_schedule_and_a_given_one_is_kept():
    module = Module()
    trainer(max_steps=4).fit(module, datamodule=Data())
    assert module.total_steps == 4
    module = Module()
    module.total_steps = 100
    trainer().fit(module, datamodule=Data())
    assert module.total_steps == 100


def test_fast_dev_run_looks_at_the_first_stage():
    module = Module()
    trainer(fast_dev_run=True).fit(module, datamodule=Data())
    assert module.levels == [32]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reload_dataloaders_every_n_epochs": 0}, "reload_dataloaders_every_n_epochs: 1"),
        ({"max_epochs": 3}, "trainer.max_epochs to 2"),
    ],
)
def test_errors_say_what_to_set(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes).fit(Module(), datamodule=Data())


def test_a_datamodule_without_stages_is_refused():
    loader = torch.utils.data.DataLoader([1, 2])
    with pytest.raises(ValueError, match="attribute `stages`"):
        trainer().fit(Module(), loader)


class Rest(torch.utils.data.IterableDataset):
    """The batches of a stage from `start` on; its length is that of the stage, as Lightning counts."""

    def __init__(self, stage, start):
        self.stage, self.start = stage, start

    def __len__(self):
        return self.stage.num_batches

    def __iter__(self):
        return iter([self.stage.level] * (self.stage.num_batches - self.start))


class Positions(Data):
    """Goes on behind the batches that were trained on, as our DataModules do."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def train_dataloader(self):
        stage = self.stages[self.trainer.current_epoch]
        before = sum(one.num_batches for one in self.stages[: self.trainer.current_epoch])
        return torch.utils.data.DataLoader(Rest(stage, max(0, self.seen - before)), batch_size=None)

    def on_after_batch_transfer(self, batch, index):
        self.seen += 1
        return batch

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize("lengths", [(2, 4, 3), (4, 2, 5), (3, 3, 3)])
@pytest.mark.parametrize("past", [0, 1])
def test_goes_on_where_a_stage_ends_whatever_the_length_of_the_next(tmp_path, lengths, past):
    """The checkpoint is that of a stage's last batch."""
    stages = [Stage(level=level, num_batches=length) for level, length in zip((32, 64, 32), lengths)]
    cut = sum(lengths[: past + 1])

    def fit(checkpoint=None):
        module = Module()
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=cut, save_top_k=-1)
        callbacks = [ResolutionCurriculum(stages), *([keep] if checkpoint is None else [])]
        run = trainer(callbacks=callbacks, max_epochs=3, enable_checkpointing=checkpoint is None)
        run.fit(module, datamodule=Positions(), ckpt_path=checkpoint)
        assert (run.global_step, run.current_epoch) == (sum(lengths), 3)
        return module.levels

    straight = fit()
    assert fit(tmp_path / f"step={cut}.ckpt") == straight[cut:]
