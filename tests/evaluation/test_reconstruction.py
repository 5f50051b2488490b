"""Metrics of reconstructions against plain formulas: means over images, splits, levels and scales."""

import math
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from nextflow.evaluation.image_distances import psnr
from nextflow.evaluation.reconstruction import ReconstructionMetrics, evaluate
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.usage import CodebookUsage
from nextflow.sequence.scales import ScaleSchedule

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8)
PIXEL = PixelConfig(layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4)
CODEBOOK_SIZE = 32


def _metrics() -> ReconstructionMetrics:
    return ReconstructionMetrics(CodebookUsage(3, CODEBOOK_SIZE), CODEBOOK_SIZE)


def _tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    config = TokenizerConfig(
        schedule=SCHEDULE, codebook_size=CODEBOOK_SIZE, pixel_dim=4, pixel=PIXEL, semantic=None, semantic_dim=0
    )
    return Tokenizer(config).eval()


def _batch(seed: int, *, level: int = 32, split: str = "validation", count: int = 3, valid_size=None):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, level, level), dtype=torch.uint8, generator=generator)
    return SimpleNamespace(
        images=images,
        grids=SCHEDULE.grids(level),
        level=level,
        split=split,
        keys=[f"{seed}-{row}" for row in range(count)],
        valid_size=valid_size,
    )


def _evaluated(batches, *, per_scale=True):
    tokenizer, metrics = _tokenizer(), _metrics()
    done = [evaluate(tokenizer, batch, metrics, per_scale) for batch in batches]
    return tokenizer, metrics.compute("cpu"), done


def _decoded(tokenizer, batch, num_scales=None):
    codes = tokenizer.encode(batch.images / 127.5 - 1, batch.grids).target_codes_BN
    return (tokenizer.decode(codes, batch.grids, num_scales).clamp(-1, 1) + 1) / 2


def _psnr_by_hand(decoded, images) -> list[float]:
    return [-10 * math.log10(((a - b / 255) ** 2).mean()) for a, b in zip(decoded, images)]


def test_psnr_and_ssim_are_means_over_images_of_all_batches():
    batches = [_batch(0, count=4), _batch(1, count=1)]
    tokenizer, result, done = _evaluated(batches)
    by_hand = [value for batch in batches for value in _psnr_by_hand(_decoded(tokenizer, batch), batch.images)]
    their_psnr, their_ssim = (
        PeakSignalNoiseRatio((0.0, 1.0), dim=(1, 2, 3)),
        StructuralSimilarityIndexMeasure(data_range=1.0),
    )
    for batch in batches:
        their_psnr.update(_decoded(tokenizer, batch), batch.images / 255)
        their_ssim.update(_decoded(tokenizer, batch), batch.images / 255)
    (group,) = result.groups
    assert torch.cat([one.psnr_B for one in done]).tolist() == pytest.approx(by_hand, rel=1e-5)
    assert group.psnr == pytest.approx(sum(by_hand) / 5, rel=1e-6)
    assert group.psnr == pytest.approx(float(their_psnr.compute()), rel=1e-5)
    assert group.ssim == pytest.approx(float(their_ssim.compute()), rel=1e-5)
    assert (group.split, group.level, group.images, group.lpips, group.rfid) == ("validation", 32, 5, None, None)


def test_a_perfect_image_counts_as_100_decibels():
    images = torch.rand(2, 3, 16, 16)
    assert psnr(images, images).tolist() == [100.0, 100.0]


def test_autocast_does_not_reach_ssim():
    batch = _batch(0)
    tokenizer, expected, _ = _evaluated([batch])
    metrics = _metrics()
    codes = tokenizer.encode(batch.images / 127.5 - 1, batch.grids).target_codes_BN
    decoded = tokenizer.decode(codes, batch.grids)
    with torch.autocast("cpu", torch.bfloat16):
        metrics.update(
            images_BCHW=batch.images,
            decoded_BCHW=decoded,
            codes_BN=codes,
            grids=batch.grids,
            split="validation",
            level=32,
        )
    assert metrics.compute("cpu").groups[0].ssim == pytest.approx(expected.groups[0].ssim, rel=1e-6)


def test_scales_are_the_reconstructions_from_the_first_few():
    batches = [_batch(0), _batch(1)]
    tokenizer, result, _ = _evaluated(batches)
    codes = torch.cat([tokenizer.encode(b.images / 127.5 - 1, b.grids).target_codes_BN for b in batches])
    scales = result.groups[0].scales
    assert [scale.codes for scale in scales] == [1, 4, 16]
    for number, (scale, part) in enumerate(zip(scales, codes.split([1, 4, 16], dim=1)), start=1):
        by_hand = [v for b in batches for v in _psnr_by_hand(_decoded(tokenizer, b, number), b.images)]
        assert scale.psnr == pytest.approx(sum(by_hand) / 6, rel=1e-5)
        share = torch.bincount(part.flatten(), minlength=CODEBOOK_SIZE) / part.numel()
        entropy = -(share * share.clamp_min(1e-12).log2()).sum()
        assert scale.bits == part.shape[1] * 5
        assert scale.effective_bits == pytest.approx(float(part.shape[1] * entropy), abs=1e-4)
        assert scale.usage == pytest.approx(len(part.unique()) / CODEBOOK_SIZE)
    assert scales[-1].psnr == pytest.approx(result.groups[0].psnr)
    assert result.groups[0].usage == pytest.approx(len(codes.unique()) / CODEBOOK_SIZE)


def test_splits_and_levels_are_apart_and_together():
    batches = [
        _batch(0, split="a", count=4),
        _batch(1, split="b", count=1),
        _batch(2, split="a", level=16, count=2),
    ]
    _, result, done = _evaluated(batches)
    means = [float(one.psnr_B.double().mean()) for one in done]
    assert [(g.split, g.level, g.images) for g in result.groups] == [("a", 16, 2), ("a", 32, 4), ("b", 32, 1)]
    assert [g.psnr for g in result.groups] == pytest.approx([means[2], means[0], means[1]])
    logged = result.logged("test")
    assert logged["test/psnr/32"] == pytest.approx((4 * means[0] + means[1]) / 5)
    assert logged["test/psnr/32/b"] == pytest.approx(means[1])
    assert logged["test/psnr"] == pytest.approx((logged["test/psnr/32"] + means[2]) / 2)
    assert {"test/psnr/16/scale_02", "test/psnr/32/scale_03", "test/ssim/32", "tokenizer/usage/scale_03"} <= set(logged)
    assert "test/psnr/16/scale_03" not in logged and len(result.groups[0].scales) == 2


def test_validation_measures_no_scales_and_names_no_split():
    _, result, _ = _evaluated([_batch(0)], per_scale=False)
    assert [scale.psnr for scale in result.groups[0].scales] == [None, None, None]
    assert not any("scale" in name or "validation" in name for name in result.logged("val") if "val/" in name)


def test_padding_is_not_compared():
    batch = _batch(0, valid_size=(27, 32))
    tokenizer, result, done = _evaluated([batch])
    by_hand = _psnr_by_hand(_decoded(tokenizer, batch)[:, :, :27], batch.images[:, :, :27])
    assert result.groups[0].psnr == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    by_hand = _psnr_by_hand(_decoded(tokenizer, batch, 1)[:, :, :27], batch.images[:, :, :27])
    assert result.groups[0].scales[0].psnr == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert done[0].images_BCHW.shape == done[0].decoded_BCHW.shape == (3, 3, 27, 32)


def test_any_size_counts_under_its_level_and_a_tiny_one_has_no_ssim():
    wide, tiny = _batch(0, count=2), _batch(1, count=2)
    wide.images, wide.grids = wide.images.repeat(1, 1, 1, 2), SCHEDULE.native_grids(32, 64)
    tiny.images, tiny.grids = tiny.images[:, :, :8, :16], ((1, 1), (1, 2))
    _, result, done = _evaluated([wide, tiny])
    (group,) = result.groups
    assert group.images == 4 and group.psnr == pytest.approx(float(torch.cat([d.psnr_B for d in done]).mean()))
    assert group.scales[1].codes == (math.prod(wide.grids[1]) + 2) / 2
    _, only_wide, _ = _evaluated([wide])
    assert group.ssim == pytest.approx(only_wide.groups[0].ssim)


def test_reset_forgets():
    metrics = _metrics()
    evaluate(_tokenizer(), _batch(0), metrics)
    metrics.reset()
    assert metrics.compute("cpu").groups == ()
