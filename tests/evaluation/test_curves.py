"""Curves come from TensorBoard files; a resumed run's later value counts; wrong folders and tags are named."""

import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from nextflow.evaluation.curves import draw_curves, read_run


@pytest.fixture
def folder(tmp_path):
    for value in (1.0, 2.0):  # the second time from step 10 on, as after an interruption
        with SummaryWriter(str(tmp_path / "pixel"), filename_suffix=str(value)) as writer:
            for step in range(0 if value == 1.0 else 10, 30 if value == 2.0 else 20, 10):
                writer.add_scalar("val/psnr", value + step, step)
    return tmp_path / "pixel"


def test_a_resumed_run_is_one_curve(folder):
    run = read_run(folder, ["val/psnr"])
    assert run.curves == {"val/psnr": [(0, 1.0), (10, 12.0), (20, 22.0)]} and run.last_step == 20


def test_the_picture_shows_every_run(folder, tmp_path):
    run = read_run(folder, ["val/psnr"])
    for overlay in (False, True):
        draw_curves([run, run], tmp_path / "one.png", overlay=overlay)
        colours = Image.open(tmp_path / "one.png").convert("RGB").getcolors(1 << 20)
        blue, orange = (31, 119, 180), (255, 127, 14)
        seen = {colour for _, colour in colours}
        assert blue in seen and (orange in seen) == overlay


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no TensorBoard file"):
        read_run(tmp_path, ["val/psnr"])
    with pytest.raises(ValueError, match="it has val/psnr"):
        read_run(folder, ["val/pnsr"])
