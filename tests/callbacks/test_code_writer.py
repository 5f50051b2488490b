"""Codes -> shards -> codes, documents with several images, and the second run that does nothing."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from nextflow.callbacks.code_writer import CodeWriter
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import decode_codes, open_shard

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
        input_codes_BN=codes + 1 if corrected else None,
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
    assert codes.input_codes_N.tolist() == large.input_codes_BN[0].tolist()


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
