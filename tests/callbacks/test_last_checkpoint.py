"""last.ckpt is the end of the run, saved behind its validation."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from nextflow.callbacks.last_checkpoint import LastCheckpoint, _replace, _set_aside


class Module(L.LightningModule):
    def __init__(self, stop_in_validation_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_at, self.validated = stop_in_validation_at, []

    def training_step(self, batch, index):
        return self.weight * 1.0

    def validation_step(self, batch, index):
        if self.global_step == self.stop_at:
            raise RuntimeError("the power went out")
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(module, folder, max_steps, ckpt_path=None, logger=False):
    dirpath = None if logger else str(folder)
    trainer = L.Trainer(
        max_steps=max_steps, max_epochs=-1, val_check_interval=3, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        callbacks=[LastCheckpoint(dirpath, every_n_train_steps=2)], logger=logger, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(range(100), batch_size=None)
    trainer.fit(module, data, data if module.stop_at is not None or ckpt_path else None, ckpt_path=ckpt_path)


def step_of(folder, name="last.ckpt") -> int:
    return torch.load(folder / name, weights_only=False)["global_step"]


@pytest.mark.parametrize("max_steps", [5, 6])
def test_ends_with_the_last_step(tmp_path, max_steps):
    module = Module()
    fit(module, tmp_path, max_steps)
    assert step_of(tmp_path) == max_steps
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]["weight"]
    assert float(saved) == float(module.weight) == -max_steps


def test_a_run_interrupted_in_its_last_validation_validates_when_resumed(tmp_path):
    with pytest.raises(RuntimeError, match="power"):
        fit(Module(stop_in_validation_at=6), tmp_path, 6)
    assert step_of(tmp_path) == 4
    resumed = Module()
    fit(resumed, tmp_path, 6, ckpt_path=tmp_path / "last.ckpt")
    assert 6 in resumed.validated and step_of(tmp_path) == 6


def test_without_a_folder_it_is_the_loggers_and_last_finds_it(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version="")
    fit(Module(), None, 4, logger=logger)
    assert step_of(tmp_path / "run") == 4
    resumed = Module()
    fit(resumed, None, 6, ckpt_path="last", logger=logger)
    assert float(resumed.weight) == -6 and step_of(tmp_path / "run") == 6


def test_a_second_run_takes_the_name_over_and_a_resumed_one_keeps_it(tmp_path):
    fit(Module(), tmp_path, 5)
    fit(Module(), tmp_path, 7, ckpt_path=tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt"] and step_of(tmp_path) == 7
    fit(Module(), tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert step_of(tmp_path) == 3 and step_of(tmp_path, "previous.ckpt") == 7


def test_folders_of_shards_are_set_aside_too(tmp_path):
    for name, number in (("last.ckpt.a", 1), ("draft", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "number").write_text(str(number))
    last = tmp_path / "last.ckpt"
    last.symlink_to("last.ckpt.a")
    _set_aside(last, tmp_path / "previous.ckpt")
    _replace(last, tmp_path / "draft")
    assert (last / "number").read_text() == "2" and (tmp_path / "previous.ckpt" / "number").read_text() == "1"
