"""A folder reads as one shard: keys that shards accept, formats as Pillow knows them, images at their own size."""

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow.datamodules.image_folder import ImageFolder, ImageFolderDataModule, shard_safe_key
from nextflow.datamodules.pixels import decode_image
from nextflow.sequence.native import fit_to_stride
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import ShardHeader, ShardWriter, open_shard

SCHEDULE = ScaleSchedule(sides=(1, 2, 3, 4, 5, 6, 8), levels={32: 4, 64: 7}, stride=8)
SIZES = {"a": (40, 33), "b": (64, 64), "c": (40, 33), "d": (33, 40), "e": (40, 40)}


def picture(size, seed=0):
    """A random picture of (height, width), uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(picture(size, seed)).save(folder / ("deep" if name > "c" else ".") / f"{name}.png")
    Image.fromarray(picture((8, 8))).save(folder / "deep" / ".hidden" / "x.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def native(folder, **options):
    return ImageFolderDataModule(
        folders={"validation": str(folder)}, schedule=SCHEDULE, resolution="native", **{"batch_size": 4, **options}
    )


def test_keys_are_those_of_shards(tmp_path):
    paths = [
        "cat.jpg",
        "2024/a dog.png",
        "_x.png",
        "a.b/c.d.jpg",
        "\u00e4/\u00f6.png",
        "long/" + "x" * 120 + ".png",
        "1.gif",
    ]
    keys = [shard_safe_key(path) for path in paths]
    assert (keys[0], keys[-1]) == ("cat", "1") and keys[1].startswith("2024/a-dog-")
    assert len(set(keys)) == len(paths)
    with ShardWriter(tmp_path, header=ShardHeader(kind="documents")) as writer:
        for key in keys:
            writer.write(key, {"segments": [{"image": "0.png"}]}, {"0.png": key.encode()})
    shard = open_shard(tmp_path / "000000.tar")
    assert shard.keys == keys
    assert [shard.read(key, "0.png").decode() for key in keys] == keys


def test_files_of_one_name_have_keys_of_their_own(tmp_path):
    for end in ("jpg", "png", "webp"):
        Image.fromarray(picture((9, 9))).save(tmp_path / f"same.{end}")
    shard = ImageFolder(tmp_path)
    assert len(shard.keys) == 3 and shard.keys[0] == "same"
    assert [shard.record(key)["metadata"]["file"] for key in shard.keys] == ["same.jpg", "same.png", "same.webp"]


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [("", "a b c deep/d deep/e"), ("**/*.png", "a b c deep/d deep/e"), ("*", "a b c"), ("deep/*.png", "d e"), ("b.png", "b")],
)  # fmt: skip
def test_a_folder_and_a_pattern_find_pictures_alone(photos, pattern, keys):
    data = ImageFolderDataModule(folders={"train": f"{photos}/{pattern}"}, levels=[32], schedule=SCHEDULE, batch_size=1)
    assert {key for batch in data.train_dataloader() for key in batch.keys} == set(keys.split())


def test_a_bracket_in_a_name_that_exists_is_no_pattern(photos):
    renamed = photos.rename(photos.parent / "photos [2024]")
    assert ImageFolder(renamed).keys == ["a", "b", "c", "deep/d", "deep/e"]
    assert ImageFolder(renamed / "b.png").keys == ["b"]


def test_pictures_of_any_mode_become_rgb(tmp_path):
    colours = picture((12, 10), 1)
    shown = Image.fromarray(colours)
    grey = np.asarray(shown.convert("L"))
    made = {
        "rgb.bmp": (shown, colours),
        "grey.png": (shown.convert("L"), np.stack([grey] * 3, -1)),
        "sixteen.png": (Image.fromarray(grey.astype(np.uint16) * 257), np.stack([grey] * 3, -1)),
        "sixteen.tiff": (Image.fromarray(grey.astype(np.uint16) * 257 + 100), np.stack([grey] * 3, -1)),
        "lossless.webp": (shown, colours),
        "clear.png": (Image.merge("RGBA", [*shown.split(), Image.new("L", shown.size, 0)]), np.full_like(colours, 255)),
    }
    for name, (image, expected) in made.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert np.array_equal(np.asarray(decode_image((tmp_path / name).read_bytes())), expected), name
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "floats.tiff")
    with pytest.raises(ValueError, match="floats"):
        decode_image((tmp_path / "floats.tiff").read_bytes())


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_native_batches_hold_each_image_at_its_own_size(photos, fit):
    seen = {}
    for batch in native(photos, fit=fit).val_dataloader():
        height, width = batch.images.shape[2:]
        assert batch.grids == SCHEDULE.native_grids(height, width)
        assert batch.level == SCHEDULE.nearest_level(height, width) and batch.aspect_ratio == height / width
        for key, image in zip(batch.keys, batch.images):
            name = key[-1]
            own_CHW = torch.from_numpy(picture(SIZES[name], list(SIZES).index(name))).permute(2, 0, 1)
            assert torch.equal(image, fit_to_stride(own_CHW, 8, fit))
            padded = fit == "pad" and any(side % 8 for side in SIZES[name])
            assert batch.valid_size == (SIZES[name] if padded else None)
        seen[tuple(batch.keys)] = (height, width)
    padded = {("a", "c"): (40, 40), ("b",): (64, 64), ("deep/d",): (40, 40), ("deep/e",): (40, 40)}
    cut = {("a", "c"): (40, 32), ("b",): (64, 64), ("deep/d",): (32, 40), ("deep/e",): (40, 40)}
    assert seen == (padded if fit == "pad" else cut)


def test_large_pictures_are_scaled_down(photos):
    for batch in native(photos, max_pixels=900).test_dataloader():
        height, width = batch.valid_size or batch.images.shape[2:]
        assert 600 < height * width <= 900
    (batch,) = native(photos / "b.png", max_pixels=32 * 32).test_dataloader()
    expected = Image.fromarray(picture((64, 64), 1)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_training_is_in_buckets_whatever_evaluation_is(photos):
    data = ImageFolderDataModule(
        folders={"train": str(photos)}, schedule=SCHEDULE, resolution="native", batch_size=1, levels=[64]
    )
    assert all(batch.grids == SCHEDULE.grids(64, batch.aspect_ratio) for batch in data.train_dataloader())


def test_no_pictures_name_the_key(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    for where in (tmp_path, tmp_path / "nowhere", tmp_path / "*.png"):
        data = ImageFolderDataModule(folders={"train": str(where)}, levels=[32], schedule=SCHEDULE)
        with pytest.raises(FileNotFoundError, match=r"data\.folders\.train: there are no images at"):
            data.train_dataloader()


def test_a_broken_file_is_skipped_and_named(photos, caplog):
    (photos / "b.png").write_bytes((photos / "b.png").read_bytes()[:60])
    options = {"folders": {"train": str(photos)}, "levels": [32], "schedule": SCHEDULE, "batch_size": 1}
    keys = {
        k for batch in ImageFolderDataModule(**options, max_bad_fraction=0.5).train_dataloader() for k in batch.keys
    }
    assert keys == {"a", "c", "deep/d", "deep/e"} and "key b" in caplog.text
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction"):
        list(ImageFolderDataModule(**options, max_bad_fraction=0.0, batches_per_epoch=9).train_dataloader())
