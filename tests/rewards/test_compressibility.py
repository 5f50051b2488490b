"""Compressibility: smooth pictures are small files; the number is the size of the file."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow.rewards.compressibility import CompressibilityReward


def test_bits_per_pixel_of_the_file():
    noise = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    plain = torch.full((3, 16, 16), 90, dtype=torch.uint8)
    scores = CompressibilityReward(quality=90)([noise, plain], ["", ""], [{}, {}])
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(noise.permute(1, 2, 0))).save(buffer, "JPEG", quality=90)
    assert scores[0] == pytest.approx(-8 * len(buffer.getvalue()) / (32 * 48))
    assert CompressibilityReward()([plain.repeat(1, 2, 3)], [""], [{}]) > CompressibilityReward()([noise], [""], [{}])


def test_quality():
    with pytest.raises(ValueError, match="quality must lie in"):
        CompressibilityReward(quality=0)
