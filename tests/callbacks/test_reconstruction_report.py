"""`python main.py test` on a tiny tokenizer: tables, numbers, and worst and best reconstructions, on one rank and on two."""

import io
import json
import os
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torchvision.models import vgg16

from nextflow.callbacks.reconstruction_report import ReconstructionReport
from nextflow.datamodules.image_folder import ImageFolderDataModule
from nextflow.datamodules.images import ImageDataModule
from nextflow.evaluation.reconstruction import ReconstructionEvaluation, ReconstructionMetrics, evaluate
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.lightning_modules.tokenizer_checkpoint import load_tokenizer
from nextflow.main import cli, main
from nextflow.models.tokenizer.config import TRAINING_ONLY, PixelConfig, TokenizerConfig
from nextflow.models.tokenizer.losses import PerceptualLoss
from nextflow.models.tokenizer.usage import CodebookUsage
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import ShardHeader, ShardWriter

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8)
PIXEL = PixelConfig(layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4)
CONFIG = TokenizerConfig(schedule=SCHEDULE, codebook_size=32, semantic_dim=0, pixel_dim=4, pixel=PIXEL, semantic=None)
NUM_IMAGES = {"train": 8, "validation": 6, "other": 2}
PLAIN = ReconstructionEvaluation()
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def _picture(seed: int, height: int = 32, width: int = 32) -> Image.Image:
    """Noise that is the stronger the larger the seed is, so that PSNRs are apart."""
    noise = np.random.default_rng(seed).normal(128, 10 + 8 * (seed % 8), (height, width, 3))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    _picture(seed).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with shards of three splits and `tokenizer.ckpt`."""
    folder = tmp_path_factory.mktemp("run")
    for split, count in NUM_IMAGES.items():
        with ShardWriter(folder / split, header=ShardHeader(kind="documents")) as writer:
            for seed in range(count):
                record = {"segments": [{"image": "0.png"}]}
                writer.write(f"{split}{seed}", record, {"0.png": _png(seed)})
    torch.manual_seed(0)
    trainer = L.Trainer(**QUIET, max_steps=4, limit_val_batches=0, enable_checkpointing=False, default_root_dir=folder)
    module = TokenizerModule(CONFIG, stage="pixel", warmup_steps=1)
    trainer.fit(module, _data(folder, shards={"train": f"{folder}/train/*.tar"}))
    trainer.save_checkpoint(folder / "tokenizer.ckpt")
    return folder


def _data(folder: Path, **options) -> ImageDataModule:
    shards = {split: f"{folder}/{split}/*.tar" for split in NUM_IMAGES}
    options = {"shards": shards, "test_splits": ["validation", "other"], "levels": [16, 32], **options}
    return ImageDataModule(**options, schedule=SCHEDULE, batch_size=2)


def _report(folder: Path, output: Path, data=None, evaluation=PLAIN, devices=1, **options) -> dict:
    """What `test` writes to metrics.json."""
    report = ReconstructionReport(str(output), **options)
    trainer = L.Trainer(**QUIET, devices=devices, callbacks=[report], default_root_dir=folder)
    module = TokenizerModule(CONFIG, stage="pixel", evaluation=evaluation)
    trainer.test(module, data or _data(folder), ckpt_path=str(folder / "tokenizer.ckpt"), verbose=False)
    return json.loads((output / "metrics.json").read_text()) if trainer.is_global_zero else {}


def _psnrs(folder: Path, split: str, level: int) -> dict[str, float]:
    """PSNR of each image by hand."""
    tokenizer = load_tokenizer(folder / "tokenizer.ckpt")
    values = {}
    for batch in _data(folder, test_splits=[split], levels=[level]).test_dataloader():
        codes = tokenizer.encode(batch.images / 127.5 - 1, batch.grids).target_codes_BN
        decoded = tokenizer.decode(codes, batch.grids).clamp(-1, 1) / 2 + 0.5
        errors = (decoded - batch.images / 255).square().mean(dim=(1, 2, 3))
        values.update(zip(batch.keys, (-10 * errors.log10()).tolist()))
    return values


@pytest.fixture
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns where arguments are passed while pytest's own stand in sys.argv."""
    monkeypatch.setattr("sys.argv", ["main.py"])


def _config(run: Path, output: Path) -> dict:
    tokenizer = {"semantic": None, "codebook_size": 32, "semantic_dim": 0, "pixel_dim": 4}
    tokenizer["schedule"] = {"sides": [1, 2, 4], "levels": {16: 2, 32: 3}, "stride": 8}
    tokenizer["pixel"] = {name: getattr(PIXEL, name) for name in ("layout", "width", "num_blocks", "stem")}
    tokenizer["pixel"].update(multipliers=[1, 2], latent_width=16, groups=4)
    report = {"class_path": "nextflow.callbacks.reconstruction_report.ReconstructionReport"}
    data = {"levels": [16, 32], "batch_size": 2, "schedule": tokenizer["schedule"]}
    data["shards"] = {"validation": f"{run}/validation/*.tar"}
    return {
        "trainer": {**QUIET, "callbacks": [{**report, "init_args": {"output": str(output)}}]},
        "model": {
            "class_path": "nextflow.lightning_modules.tokenizer.TokenizerModule",
            "init_args": {"stage": "pixel", "tokenizer": tokenizer},
        },
        "data": {"class_path": "nextflow.datamodules.images.ImageDataModule", "init_args": data},
    }


def test_command_line_writes_the_report(run, tmp_path, no_command_line, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("test.yaml").write_text(yaml.safe_dump(_config(run, tmp_path / "report")))
    built = cli(["test", "-c", "test.yaml", "--ckpt_path", str(run / "tokenizer.ckpt")])
    logged = {name: float(value) for name, value in built.trainer.callback_metrics.items()}
    numbers = json.loads(Path("report/metrics.json").read_text())
    assert numbers["checkpoint"] == str(run / "tokenizer.ckpt")
    for group, level in zip(numbers["groups"], (16, 32)):
        assert (group["split"], group["level"], group["images"]) == ("validation", level, 6)
        by_hand = _psnrs(run, "validation", level)
        assert group["psnr"] == pytest.approx(np.mean(list(by_hand.values())), rel=1e-5)
        assert logged[f"test/psnr/{level}"] == pytest.approx(group["psnr"])
        for number, scale in enumerate(group["scales"], start=1):
            assert logged[f"test/psnr/{level}/scale_{number:02d}"] == pytest.approx(scale["psnr"])
        assert group["scales"][-1]["psnr"] == pytest.approx(group["psnr"])
    table, printed = Path("report/table.md").read_text(), capsys.readouterr().out
    assert f"| validation | 32 | 6 | {numbers['groups'][1]['psnr']:.2f} dB |" in table
    assert "Where the bits go: validation, level 16" in table and "Where the bits go" in printed
    assert {path.name for path in Path("report").iterdir()} == {
        "table.md",
        "metrics.json",
        "contact_sheet.png",
        "coarse_to_fine.png",
    }


def test_worst_and_best_are_those(run, tmp_path):
    groups = _report(run, tmp_path, num_extremes=2)["groups"]
    assert [(group["split"], group["level"]) for group in groups] == [
        ("other", 16),
        ("other", 32),
        ("validation", 16),
        ("validation", 32),
    ]
    for group in groups:
        by_hand = sorted((value, key) for key, value in _psnrs(run, group["split"], group["level"]).items())
        assert [found["key"] for found in group["worst"]] == [key for _, key in by_hand[:2]]
        assert [found["key"] for found in group["best"]] == [key for _, key in by_hand[::-1][:2]]
        assert [found["psnr"] for found in group["worst"]] == pytest.approx([v for v, _ in by_hand[:2]], rel=1e-5)


def test_contact_sheet_shows_image_and_reconstruction_of_the_worst(run, tmp_path):
    """A row of each group's worst and one of its best; at 32 pixels a side the pictures are drawn as they are."""
    groups = _report(run, tmp_path, data=_data(run, levels=[32]), num_extremes=1, side=32)["groups"]
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png"))
    margin, row_height = 6, (len(sheet) - 21) // 4
    top = 21 + 2 * row_height + margin  # below the header and the two rows of "other"
    left = 32 + 3 * margin  # behind the title
    worst = int(groups[1]["worst"][0]["key"].removeprefix("validation"))
    shown = sheet[top : top + 32, left : left + 32]
    assert np.array_equal(shown, np.asarray(_picture(worst)))
    decoded = sheet[top : top + 32, left + 32 + 2 * margin :][:, :32].astype(float)
    error = np.mean(((decoded - shown) / 255) ** 2)
    assert -10 * np.log10(error) == pytest.approx(groups[1]["worst"][0]["psnr"], abs=0.05)  # 8 bits


def test_images_of_any_size_from_a_folder(run, tmp_path):
    sizes = [(24, 40), (27, 30), (16, 16)]
    for number, (height, width) in enumerate(sizes):
        _picture(number, height, width).save(tmp_path / f"{number}.png")
    data = ImageFolderDataModule(
        folders={"mine": str(tmp_path)}, schedule=SCHEDULE, resolution="native", test_splits=["mine"], batch_size=4
    )
    groups = _report(run, tmp_path / "report", data=data)["groups"]
    assert [(group["split"], group["level"], group["images"]) for group in groups] == [("mine", 16, 1), ("mine", 32, 2)]
    tokenizer = load_tokenizer(run / "tokenizer.ckpt")
    padded = torch.from_numpy(np.pad(np.asarray(_picture(1, 27, 30)), ((0, 5), (0, 2), (0, 0)), mode="edge"))
    image = padded.permute(2, 0, 1)[None] / 255
    grids = SCHEDULE.native_grids(32, 32)
    decoded = tokenizer.decode(tokenizer.encode(image * 2 - 1, grids).target_codes_BN, grids).clamp(-1, 1) / 2 + 0.5
    error = (decoded - image)[:, :, :27, :30].square().mean()
    (found,) = (one for one in groups[1]["worst"] if one["key"] == "1")
    assert found["psnr"] == pytest.approx(float(-10 * error.log10()), rel=1e-4)


def test_lpips_is_the_losss_and_changes_no_checkpoint(run, tmp_path):
    weights = tmp_path / "vgg16.pth"
    torch.save(vgg16().features.state_dict(prefix="features."), weights)
    evaluation = ReconstructionEvaluation(lpips_weights=str(weights), per_scale=False)
    (group,) = _report(run, tmp_path, _data(run, test_splits=["other"], levels=[32]), evaluation)["groups"]
    loss, tokenizer = PerceptualLoss(weights), load_tokenizer(run / "tokenizer.ckpt")
    (batch,) = _data(run, test_splits=["other"], levels=[32]).test_dataloader()
    images = batch.images / 127.5 - 1
    decoded = tokenizer.decode(tokenizer.encode(images, batch.grids).target_codes_BN, batch.grids).clamp(-1, 1)
    assert group["lpips"] == pytest.approx(float(loss(decoded, images)), rel=1e-4)
    assert group["scales"][0]["psnr"] is None


def test_mistakes_end_with_one_line_before_any_batch(run, tmp_path, no_command_line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("test.yaml").write_text(yaml.safe_dump(_config(run, tmp_path / "report")))
    command = ["test", "-c", "test.yaml", "--ckpt_path", str(run / "tokenizer.ckpt")]
    for options, message in (
        (
            ["--model.evaluation.rfid=true"],
            "model.evaluation.inception_weights: None is not a file; give torch-fidelity's",
        ),
        (["--model.evaluation.lpips_weights=no.pth"], "model.evaluation.lpips_weights: no.pth is not a file"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*command, *options])
    with pytest.raises(SystemExit, match="give --ckpt_path"):
        main(command[:3])
    assert not Path("report").exists()


def test_openmoji_config_evaluates_what_the_recipe_trains(root):
    """`--ckpt_path` restores weights alone, so the architecture stands in both configs."""
    evaluated, trained = (
        yaml.safe_load((root / "configs" / "openmoji" / f"{name}.yaml").read_text())
        for name in ("evaluate_tokenizer", "tokenizer_decoder")
    )
    architecture = evaluated["model"]["init_args"]["tokenizer"]
    recipe = trained["model"]["init_args"]["tokenizer"]
    assert architecture == {name: value for name, value in recipe.items() if name not in TRAINING_ONLY}
    assert evaluated["data"]["init_args"]["schedule"] == architecture["schedule"]


def _logged(run: Path, numbers: slice) -> dict[str, float]:
    """Metrics of some of the batches, over all ranks."""
    tokenizer = load_tokenizer(run / "tokenizer.ckpt")
    metrics = ReconstructionMetrics(CodebookUsage(3, CONFIG.codebook_size), CONFIG.codebook_size)
    for batch in list(_data(run).test_dataloader())[numbers]:
        evaluate(tokenizer, batch, metrics, per_scale=True)
    return metrics.compute("cpu").logged("test")


def _on_rank(folder: Path) -> None:
    """However batches are dealt out: one rank without those of "other", one without any."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    shares = {"dealt": slice(0, 2) if rank else slice(2, None), "alone": slice(0, None if rank else 0)}
    results = {name: _logged(folder / "run", numbers) for name, numbers in shares.items()}
    dist.destroy_process_group()
    _report(folder / "run", folder, devices=2, num_extremes=2)
    torch.save(results, folder / f"{rank}.pt")


def test_two_ranks_measure_and_write_what_one_does(run, tmp_path, two_ranks):
    (tmp_path / "run").symlink_to(run)
    for results in two_ranks(Path(__file__), tmp_path):
        for logged in results.values():
            assert logged == pytest.approx(_logged(run, slice(None)), rel=1e-6, abs=1e-6)
    (tmp_path / "one").mkdir()
    one, two = _report(run, tmp_path / "one", num_extremes=2), json.loads((tmp_path / "metrics.json").read_text())
    for a, b in zip(one["groups"], two["groups"]):
        for extremes in ("worst", "best"):
            assert [image["key"] for image in a[extremes]] == [image["key"] for image in b[extremes]]
        assert a["images"] == b["images"] and a["psnr"] == pytest.approx(b["psnr"], rel=1e-6)
    one_sheet, two_sheet = (
        np.asarray(Image.open(folder / "contact_sheet.png")).astype(int) for folder in (tmp_path / "one", tmp_path)
    )
    assert abs(one_sheet - two_sheet).max() <= 2  # other batches, other rounding to 8 bits


if __name__ == "__main__":
    _on_rank(Path(sys.argv[1]))
