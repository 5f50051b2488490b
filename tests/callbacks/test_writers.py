"""Writers leave complete, ordered files, and a repeated run replaces them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from nextflow.callbacks.metrics_writer import MetricsWriter
from nextflow.callbacks.writers import CaptionWriter, ImageWriter, ReconstructionWriter
from nextflow.generation.requests import Generated


class Batches(torch.utils.data.Dataset):
    """Prompts 0 to 4 in batches that come in another order than their numbers."""

    batches = ((3, 4), (0, 1), (2,))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> torch.Tensor:
        return torch.tensor(self.batches[place])


class Generator(L.LightningModule):
    """Predicts a picture of one colour per prompt; `shift` stands for weights."""

    def __init__(self, shift: int = 0, text: bool = False) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(float(shift)))
        self.text = text

    def predict_step(self, batch, batch_idx):
        return [
            Generated(
                index=int(index), prompt=f"prompt {index}, é", seed=7, level=64, aspect_ratio=0.5, key=f"K{index}",
                split="train",
                image=None if self.text else torch.full((8, 16, 3), 10 * int(index) + int(self.shift), dtype=torch.uint8),
                text=f"text {index}" if self.text else None,
            )
            for index in batch
        ]  # fmt: skip


def predict(module: L.LightningModule, callback: L.Callback, tmp_path, ckpt_path: str | None = None) -> None:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
    trainer.predict(module, loader, return_predictions=False, ckpt_path=ckpt_path)


def save(module: L.LightningModule, path) -> str:
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": L.__version__}, path)
    return str(path)


def pixel(path) -> int:
    return int(np.asarray(Image.open(path))[0, 0, 0])


def test_pictures_and_their_lines_are_in_the_order_of_the_prompts(tmp_path):
    predict(Generator(), ImageWriter(str(tmp_path / "out"), columns=2), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == [f"{index:05d}.png" for index in range(5)]
    assert records[2] == {
        "file": "00002.png", "prompt": "prompt 2, é", "seed": 7, "level": 64, "aspect_ratio": 0.5, "key": "K2",
        "split": "train",
    }  # fmt: skip
    assert [pixel(tmp_path / "out" / record["file"]) for record in records] == [0, 10, 20, 30, 40]
    assert Image.open(tmp_path / "out/00000.png").size == (16, 8)
    assert Image.open(tmp_path / "out/grid.png").width == 2 * 140
    assert not list((tmp_path / "out").glob(".*")), "a partial file is left"


def test_a_repeated_run_replaces_pictures_whatever_changed(tmp_path):
    """Guidance or sampling may have changed, which neither prompt nor checkpoint tells."""
    out = tmp_path / "out"
    checkpoint = save(Generator(shift=1), tmp_path / "first.ckpt")
    predict(Generator(), ImageWriter(str(out)), tmp_path, checkpoint)
    assert pixel(out / "00001.png") == 11
    Image.new("RGB", (16, 8)).save(out / "00001.png")
    predict(Generator(), ImageWriter(str(out)), tmp_path, checkpoint)
    assert pixel(out / "00001.png") == 11
    assert len((out / "samples.jsonl").read_text().splitlines()) == 5


def test_captions_are_one_file_in_order(tmp_path):
    predict(Generator(text=True), CaptionWriter(str(tmp_path / "caption/captions.jsonl")), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "caption/captions.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3, 4]
    assert records[4] == {"index": 4, "key": "K4", "split": "train", "reference": "prompt 4, é", "caption": "text 4"}


class Coder(L.LightningModule):
    """Predicts codes that its tokenizer decodes to a picture of one grey."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer = SimpleNamespace(
            decode=lambda codes_BN, grids: (codes_BN[:, :1, None, None] / 127.5 - 1).expand(-1, 3, 8, 8) * 1.0
        )

    def predict_step(self, batch, batch_idx):
        return SimpleNamespace(
            keys=[f"K{index}" for index in batch], codes_BN=batch[:, None] * 10, grids=((1, 1),), level=32, aspect_ratio=1.0,
            records=[{"segments": [{"text": f"drawing {index}"}, {"image": "0.png"}]} for index in batch],
            valid_size=None,
        )  # fmt: skip


def test_reconstructions_name_their_drawings(tmp_path):
    predict(Coder(), ReconstructionWriter(str(tmp_path / "out")), tmp_path)
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [record["key"] for record in records] == ["K3", "K4", "K0", "K1", "K2"]
    assert records[1] == {"file": "00001.png", "prompt": "drawing 4", "key": "K4", "level": 32, "aspect_ratio": 1.0}
    assert pixel(tmp_path / "out/00001.png") == 40


class Fitted(L.LightningModule):
    """One weight, one training and one validation metric."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        loss = (self.weight * batch.float().mean()).sum()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/psnr", batch.float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("given", [True, False])
def test_metrics_of_fit_are_one_json_file_that_validate_updates(tmp_path, given):
    output = tmp_path / ("run/metrics.json" if given else "metrics.json")
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        enable_checkpointing=False, callbacks=[MetricsWriter(str(output) if given else None)], default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
    module = Fitted()
    trainer.fit(module, loader, loader)
    metrics = json.loads(output.read_text())
    assert {"train/loss", "val/psnr", "fit/seconds"} <= set(metrics) and metrics["fit/steps"] == 3
    smaller = torch.utils.data.DataLoader([torch.tensor([50])], batch_size=None)
    trainer.validate(module, smaller, verbose=False)
    updated = json.loads(output.read_text())
    assert updated["val/psnr"] == 50.0 and updated["train/loss"] == metrics["train/loss"]


def test_fast_dev_run_leaves_the_metrics_of_the_real_run_alone(tmp_path):
    (tmp_path / "metrics.json").write_text("{}\n")
    trainer = L.Trainer(
        accelerator="cpu", fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[MetricsWriter(str(tmp_path / "metrics.json"))], default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None)
    trainer.fit(Fitted(), loader, loader)
    assert (tmp_path / "metrics.json").read_text() == "{}\n"
