"""Codes -> shards -> codes, documents with several images, and the second run that does nothing."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nextflow.callbacks.code_writer import CodeWriter
from nextflow.datamodules.images import ImageDataModule
from nextflow.datamodules.text_to_image import TextToImageDataModule
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.main import cli
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.sequence.correction import CorrectedCodes
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import ShardHeader, ShardWriter, decode_codes, open_shard
from nextflow.sequence.text_tokenizer import train_text_tokenizer

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8)
PAIR = {"segments": [{"image": "0.png"}, {"text": "red"}, {"image": "1.png"}], "source": "test"}
SINGLE = {"segments": [{"text": "a cat"}, {"image": "0.png"}], "source": "test"}


def _prediction(level, split, images, corrected=False) -> SimpleNamespace:
    codes = torch.arange(len(images) * SCHEDULE.num_codes(level)).view(len(images), -1) + level
    return SimpleNamespace(
        keys=[key for key, _, _ in images],
        names=[name for _, name, _ in images],
        records=[record for _, _, record in images],
        codes_BN=codes,
        corrected=CorrectedCodes(codes + 1, codes + 2) if corrected else None,
        grids=SCHEDULE.grids(level),
        level=level,
        aspect_ratio=1.0,
        split=split,
    )


class _Module(L.LightningModule):
    def __init__(self, fingerprint="f" * 16):
        super().__init__()
        self.tokenizer = SimpleNamespace(schedule=SCHEDULE, fingerprint=lambda: fingerprint)
        self.predicted = 0

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.predicted += 1
        return batch


class _Data(L.LightningDataModule):
    def __init__(self, folder, batches):
        super().__init__()
        self.shards, self.levels, self.batches = {"train": f"{folder}/data/*.tar"}, [16], batches
        self.folder = folder

    def source_files(self, split):
        return sorted((self.folder / "data").glob("*.tar"))

    def predict_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)


def _predict(folder, batches, module=None, **options) -> _Module:
    module = module or _Module()
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[CodeWriter(str(folder), **options)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, datamodule=_Data(folder, batches), return_predictions=False)
    return module


def test_codes_survive_and_land_by_level_and_split(tmp_path):
    small = _prediction(16, "train", [("a", "0.png", SINGLE), ("b", "0.png", SINGLE)])
    large = _prediction(32, "validation", [("a", "0.png", SINGLE)], corrected=True)
    _predict(tmp_path, [small, large], text="CC BY")
    shard = open_shard(tmp_path / "16" / "train" / "000000.tar")
    assert shard.keys == ["a", "b"] and shard.record("b") == SINGLE
    assert shard.header.tokenizer == "f" * 16 and shard.header.text == "CC BY"
    assert ScaleSchedule.from_dict(shard.header.schedule) == SCHEDULE
    codes = decode_codes(shard.read("b", "0.npz"))
    assert codes.codes_N.tolist() == small.codes_BN[1].tolist() and codes.input_codes_N is None
    assert (codes.level, codes.base_grid) == (16, SCHEDULE.base_grid(1.0))
    codes = decode_codes(open_shard(tmp_path / "32" / "validation" / "000000.tar").read("a", "0.npz"))
    assert codes.input_codes_N.tolist() == large.corrected.input_N[0].tolist()
    assert codes.target_codes_N.tolist() == large.corrected.target_N[0].tolist()


def test_a_document_is_written_when_all_its_images_have_codes(tmp_path):
    first = _prediction(16, "train", [("pair", "1.png", PAIR), ("half", "0.png", PAIR)])
    second = _prediction(16, "train", [("single", "0.png", SINGLE), ("pair", "0.png", PAIR)])
    _predict(tmp_path, [first, second])
    shard = open_shard(tmp_path / "16" / "train" / "000000.tar")
    assert shard.keys == ["single", "pair"]  # "half" lacks an image and is left out
    assert decode_codes(shard.read("pair", "0.npz")).codes_N.tolist() == second.codes_BN[1].tolist()
    assert decode_codes(shard.read("pair", "1.npz")).codes_N.tolist() == first.codes_BN[0].tolist()


def test_the_same_run_again_does_nothing_and_another_one_replaces(tmp_path):
    batches = [_prediction(16, "train", [(f"{i}{j}", "0.png", SINGLE) for j in range(2)]) for i in range(3)]
    assert _predict(tmp_path, batches, samples_per_shard=1).predicted == 3
    shards = sorted((tmp_path / "16" / "train").glob("*.tar"))
    written = [path.read_bytes() for path in shards]
    assert len(shards) == 6
    assert _predict(tmp_path, batches, samples_per_shard=1).predicted == 0
    assert [path.read_bytes() for path in shards] == written

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "000000.tar").write_bytes(b"new data")
    assert _predict(tmp_path, batches, samples_per_shard=1).predicted == 3
    assert _predict(tmp_path, batches, _Module("0" * 16), samples_per_shard=4).predicted == 3
    shards = sorted((tmp_path / "16" / "train").glob("*.tar"))
    assert [open_shard(path).header.tokenizer for path in shards] == ["0" * 16] * 2


def test_a_run_that_was_cut_off_is_done_again(tmp_path):
    class Dies(_Module):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("power cut")
            return batch

    batches = [_prediction(16, "train", [(str(i), "0.png", SINGLE)]) for i in range(2)]
    with pytest.raises(RuntimeError, match="power cut"):
        _predict(tmp_path, batches, Dies())
    assert not (tmp_path / "_complete.json").exists()
    assert _predict(tmp_path, batches).predicted == 2
    assert json.loads((tmp_path / "_complete.json").read_text())["run"]["tokenizer"] == "f" * 16


def test_codes_of_native_sizes_are_refused(tmp_path):
    prediction = _prediction(16, "train", [("a", "0.png", SINGLE)])
    prediction.grids = SCHEDULE.native_grids(24, 16)
    with pytest.raises(ValueError, match=r"a has the last grid \(3, 2\): set data\.resolution to buckets"):
        _predict(tmp_path, [prediction])


NUM_DOCUMENTS = 7
CONFIG = TokenizerConfig(
    schedule=SCHEDULE,
    codebook_size=32,
    pixel_dim=4,
    semantic=None,
    pixel=PixelConfig(
        layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4
    ),
)


@pytest.fixture
def run(tmp_path):
    """A command that predicts codes of seven documents with a tokenizer of one training step, as a config."""
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "data", header=ShardHeader(kind="documents")) as writer:
        for index in range(NUM_DOCUMENTS):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.write(f"d{index}", SINGLE, {"0.png": buffer.getvalue()})
    data = {"shards": {"train": f"{tmp_path}/data/*.tar"}, "levels": [16], "batch_size": 2}
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=1, enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    module = TokenizerModule(CONFIG, stage="pixel")
    trainer.fit(module, datamodule=ImageDataModule(**data, schedule=SCHEDULE))
    # The entries began as copies of the few features of a batch: between equal ones rounding would decide, and that depends
    # on the size of a batch.
    torch.nn.init.normal_(module.tokenizer.quantizer.pixel_codebook, generator=torch.Generator().manual_seed(0))
    trainer.save_checkpoint(tmp_path / "tokenizer.ckpt")
    config = {
        "ckpt_path": str(tmp_path / "tokenizer.ckpt"),
        "trainer": {
            **quiet,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {
                    "class_path": "nextflow.callbacks.code_writer.CodeWriter",
                    "init_args": {"output": str(tmp_path / "codes"), "samples_per_shard": 2},
                }
            ],
        },
        "model": {
            "class_path": "nextflow.lightning_modules.tokenizer.TokenizerModule",
            "init_args": {
                "stage": "pixel",
                "tokenizer": CONFIG.to_dict(),
                "correction": {"fraction": 0.9, "temperature": 10.0},
            },
        },
        "data": {
            "class_path": "nextflow.datamodules.images.ImageDataModule",
            "init_args": {**data, "schedule": SCHEDULE.to_dict()},
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def _predict_with_config(run, *options):
    return cli(["predict", "-c", str(run / "run.yaml"), *options])


def _stored(run):
    """Key -> codes over all shards of the documented pattern."""
    shards = [open_shard(path) for path in sorted(run.glob("codes/16/train/*.tar"))]
    keys = [key for shard in shards for key in shard.keys]
    assert sorted(keys) == [f"d{index}" for index in range(NUM_DOCUMENTS)]  # each exactly once
    return {key: decode_codes(shard.read(key, "0.npz")) for shard in shards for key in shard.keys}


def test_two_processes_write_one_data_set(run, two_ranks):
    folder = run / "codes" / "16" / "train"
    folder.mkdir(parents=True)
    for old in ("000000", "000007-rank0of2", "000007-rank1of2", "000000-rank3of4"):
        (folder / f"{old}.tar").write_bytes(b"of an earlier run")
    two_ranks(Path(__file__), run)
    # d0 d2 d4 d6 went to rank 0, d1 d3 d5 to rank 1, two to a shard
    names = ["000000-rank0of2", "000000-rank1of2", "000001-rank0of2", "000001-rank1of2"]
    assert sorted(path.stem for path in folder.iterdir()) == names
    assert json.loads((run / "codes/_complete.json").read_text())["run"]["processes"] == 2

    by_two = _stored(run)
    _predict_with_config(run)
    assert sorted(path.stem for path in folder.iterdir()) == [f"{index:06d}" for index in range(4)]
    by_one = _stored(run)
    for key, codes in by_two.items():
        # Draws are functions of the image's name, so the number of processes does not matter.
        for name in ("codes_N", "input_codes_N", "target_codes_N"):
            assert getattr(codes, name).tolist() == getattr(by_one[key], name).tolist()


def test_fed_codes_are_stored_beside_the_targets_and_read_back(run):
    _predict_with_config(run)
    stored = _stored(run)
    assert any((codes.input_codes_N != codes.codes_N).any() for codes in stored.values())
    assert any((codes.target_codes_N != codes.codes_N).any() for codes in stored.values())
    train_text_tokenizer(["a cat"], run / "text_tokenizer", 258)
    data = TextToImageDataModule(
        shards={"train": f"{run}/codes/{{level}}/train/*.tar"},
        text_tokenizer=str(run / "text_tokenizer"),
        codebook_size=32,
        schedule=SCHEDULE,
        level=16,
        batch_size=NUM_DOCUMENTS,
    )
    (batch,) = data.train_dataloader()
    read = {
        "codes_N": batch.rows.code_N,
        "input_codes_N": batch.corrected.input_N,
        "target_codes_N": batch.corrected.target_N,
    }
    for name, codes_N in read.items():
        assert codes_N.tolist() == np.concatenate([getattr(stored[key], name) for key in batch.keys]).tolist()
    assert batch.image_names == tuple(f"/{key}.0" for key in batch.keys) and all(batch.image_losses)


if __name__ == "__main__":  # one of two processes
    folder = Path(sys.argv[1])
    rank = _predict_with_config(folder, "--trainer.devices=2", "--trainer.strategy=ddp").trainer.global_rank
    torch.save({}, folder / f"{rank}.pt")
