"""Evaluation of a tokenizer's reconstructions: metrics per split and level, and after each scale.

Images are compared in [0, 1], reconstructions clamped to it but not rounded; rFID alone reads 8 bits. PSNR, SSIM and LPIPS are
means over images of a value per image. All sums are added up over ranks: results do not depend on how images are dealt out.

B images, H W pixels, N codes of an image over all scales.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from nextflow.evaluation.image_distances import LPIPS_SIDE, SSIM_SIDE, psnr, ssim, to_bytes, to_unit
from nextflow.evaluation.inception import NUM_FEATURES, frechet_distance
from nextflow.evaluation.reconstruction_result import EVERY_SPLIT, GroupResult, ReconstructionResult, ScaleResult


@dataclass(frozen=True, kw_only=True)
class ReconstructionEvaluation:
    """What `test` measures beyond PSNR, SSIM and the use of the codebook. Validation stays with those, which are cheap."""

    per_scale: bool = True
    """PSNR of the reconstruction from the first k scales alone, for every k: one more decoding per scale."""
    lpips_weights: str | None = None
    """File of torchvision's VGG16 weights, `vgg16-397923af.pth`, for LPIPS, which is left out without it."""
    rfid: bool = False
    """Frechet distance between the Inception features of images and reconstructions; needs `inception_weights`."""
    inception_weights: str | None = None
    """File of torch-fidelity's Inception weights, `weights-inception-2015-12-05-6726825d.pth`."""


class Reconstructions(NamedTuple):
    """One batch of `test`, for callbacks. Padding is cut off."""

    keys: Sequence[str]
    split: str
    level: int
    grids: Sequence[tuple[int, int]]
    codes_BN: Tensor
    images_BCHW: Tensor
    """uint8."""
    decoded_BCHW: Tensor
    """uint8, as a file would hold them."""
    psnr_B: Tensor


class ReconstructionMetrics:
    """Collects batches and computes the results over all ranks.

    Not an nn.Module: its networks belong in no checkpoint, and its metrics are made when the first batch of a split and
    level arrives, on that batch's device.

    Args:
        usage: metric with `update(codes_BN, grids, error_S2)` whose result has share, perplexity, share_S, perplexity_S,
            error_semantic_S and error_pixel_S, S the most scales of an image; it is cloned.
        codebook_size: number of entries, for the bits of a code.
    """

    lpips: nn.Module | None = None
    """From (reconstructions, images), both in [-1, 1], to their mean distance; None leaves LPIPS out."""
    inception: nn.Module | None = None
    """What `load_inception` gives; None leaves rFID out."""
    result: ReconstructionResult | None = None
    """The last one, for callbacks."""

    def __init__(self, usage: Metric, codebook_size: int) -> None:
        self.usage, self.codebook_size = usage, codebook_size
        self._groups: dict[tuple[int, str], _Group] = {}
        self._usage_of_all: Metric | None = None

    def update(
        self,
        *,
        images_BCHW: Tensor,
        decoded_BCHW: Tensor,
        codes_BN: Tensor,
        grids: Sequence[tuple[int, int]],
        split: str,
        level: int,
        coarse_BCHW: Iterable[Tensor] = (),
        error_S2: Tensor | None = None,
    ) -> Tensor:
        """Add one batch; returns the PSNR of each image, [B].

        Args:
            images_BCHW: uint8; of any size.
            decoded_BCHW: reconstructions, about [-1, 1], not clamped.
            codes_BN: their codes.
            grids: grids of all scales.
            split: where the images come from.
            level: what they are counted under.
            coarse_BCHW: reconstructions from the first 1, 2, ... scales, those from all scales left out. Read one by one.
            error_S2: distances of each scale's entries to what they stand for, semantic and pixel part.
        """
        device = images_BCHW.device
        group, group_of_level = self._group(level, split, device), self._group(level, EVERY_SPLIT, device)
        unit_BCHW, decoded_BCHW = images_BCHW.float() / 255, to_unit(decoded_BCHW)
        values = {"psnr": psnr(decoded_BCHW, unit_BCHW)}
        for scale, (height, width) in enumerate(grids):
            values[f"codes/{scale}"] = torch.full_like(values["psnr"], height * width)
        for scale, partial_BCHW in enumerate(coarse_BCHW):
            values[f"psnr/{scale}"] = psnr(to_unit(partial_BCHW), unit_BCHW)
            values[f"psnr/{len(grids) - 1}"] = values["psnr"]
        with torch.autocast(device.type, enabled=False):  # convolutions in bfloat16 would move the second digit
            side = min(unit_BCHW.shape[-2:])
            if side >= SSIM_SIDE:
                values["ssim"] = ssim(decoded_BCHW, unit_BCHW)
            if side >= LPIPS_SIDE and self.lpips is not None:
                values["lpips"] = self.lpips(decoded_BCHW * 2 - 1, unit_BCHW * 2 - 1).expand(len(unit_BCHW))
            if group.frechet is not None:
                group.frechet.update(images_BCHW, real=True)
                group.frechet.update(to_bytes(decoded_BCHW), real=False)
        if self._usage_of_all is None:
            self._usage_of_all = self.usage.clone().to(device)
        for usage in (group.usage, group_of_level.usage, self._usage_of_all):
            usage.update(codes_BN, grids, error_S2)
        group.sums.count_in(values)
        group_of_level.sums.count_in(values)
        return values["psnr"]

    def compute(self, device: torch.device | str) -> ReconstructionResult:
        """Results over all ranks. Every rank has to call it; one without images takes part with zeros on `device`."""
        totals: dict[tuple[int, str], _Sums] = defaultdict(_Sums)
        for sums_of_rank in _over_ranks({key: group.sums for key, group in self._groups.items()}):
            for key, sums in sums_of_rank.items():
                totals[key].add(sums)
        with _no_warning_of_zeros():
            results = [self._result(*key, totals[key], device) for key in sorted(totals)]
            usage = self._usage_of_all if self._usage_of_all is not None else self.usage.clone().to(device)
            usage_of_all = usage.compute()
        groups = tuple(result for result in results if result.split != EVERY_SPLIT)
        levels = []
        for result in results:
            if result.split == EVERY_SPLIT:
                splits = [group for group in groups if group.level == result.level]
                levels.append(result._replace(rfid=splits[0].rfid) if len(splits) == 1 else result)
        groups = tuple(sorted(groups, key=lambda group: (group.split, group.level)))
        self.result = ReconstructionResult(groups, tuple(levels), usage_of_all)
        return self.result

    def reset(self) -> None:
        """Forget all batches."""
        self._groups, self._usage_of_all = {}, None

    def _group(self, level: int, split: str, device: torch.device | str) -> _Group:
        if (level, split) not in self._groups:
            if self.lpips is not None:
                self.lpips.to(device)
            frechet = None
            if self.inception is not None and split != EVERY_SPLIT:
                frechet = frechet_distance(self.inception).to(device)
            self._groups[level, split] = _Group(_Sums(), self.usage.clone().to(device), frechet)
        return self._groups[level, split]

    def _result(self, level: int, split: str, sums: _Sums, device: torch.device | str) -> GroupResult:
        group = self._group(level, split, device)
        usage = group.usage.compute()
        scales = []
        for scale, (share, perplexity) in enumerate(zip(usage.share_S.tolist(), usage.perplexity_S.tolist())):
            codes = sums.mean(f"codes/{scale}")
            if codes is None:
                break
            scales.append(
                ScaleResult(
                    codes=codes,
                    bits=codes * math.log2(self.codebook_size),
                    effective_bits=codes * math.log2(perplexity),
                    usage=share,
                    perplexity=perplexity,
                    psnr=sums.mean(f"psnr/{scale}"),
                )
            )
        images = sums.count["psnr"]
        return GroupResult(
            split=split,
            level=level,
            images=images,
            psnr=sums.total["psnr"] / images,
            ssim=sums.mean("ssim"),
            lpips=sums.mean("lpips"),
            rfid=None if group.frechet is None else _rfid(group.frechet, images, f"{split}, level {level}"),
            usage=float(usage.share),
            perplexity=float(usage.perplexity),
            scales=tuple(scales),
        )


def evaluate(tokenizer: Any, batch: Any, metrics: ReconstructionMetrics, per_scale: bool = False) -> Reconstructions:
    """Reconstruct the images of a batch from their codes and add them to the metrics; padding is left out.

    Args:
        tokenizer: has `encode` and `decode` of `nextflow.models.tokenizer.model.Tokenizer`.
        batch: has images (uint8), grids, level, split, keys and valid_size of an `ImageBatch`.
        metrics: to add to.
        per_scale: whether to decode the first 1, 2, ... scales too.
    """
    encoding = tokenizer.encode(batch.images.float() / 127.5 - 1.0, batch.grids)
    codes_BN = encoding.target_codes_BN
    height, width = getattr(batch, "valid_size", None) or batch.images.shape[-2:]

    def decoded_BCHW(num_scales: int | None = None) -> Tensor:
        return tokenizer.decode(codes_BN, batch.grids, num_scales)[:, :, :height, :width]

    images_BCHW, all_BCHW = batch.images[:, :, :height, :width], decoded_BCHW()
    psnr_B = metrics.update(
        images_BCHW=images_BCHW,
        decoded_BCHW=all_BCHW,
        codes_BN=codes_BN,
        grids=batch.grids,
        split=batch.split,
        level=batch.level,
        coarse_BCHW=map(decoded_BCHW, range(1, len(batch.grids))) if per_scale else (),
        error_S2=encoding.error_S2,
    )
    return Reconstructions(
        keys=batch.keys,
        split=batch.split,
        level=batch.level,
        grids=batch.grids,
        codes_BN=codes_BN,
        images_BCHW=images_BCHW,
        decoded_BCHW=to_bytes(to_unit(all_BCHW)),
        psnr_B=psnr_B,
    )


class _Sums:
    """Sums over images of named values, in Python's float64."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self.count: Counter[str] = Counter()

    def count_in(self, values: dict[str, Tensor]) -> None:
        """Add images with the values [B]."""
        totals = torch.stack([values_B.double().sum() for values_B in values.values()]).tolist()
        self.total.update(dict(zip(values, totals)))
        self.count.update({name: len(values_B) for name, values_B in values.items()})

    def add(self, other: _Sums) -> None:
        self.total.update(other.total)
        self.count.update(other.count)

    def mean(self, name: str) -> float | None:
        """None where no image has this value."""
        return self.total[name] / self.count[name] if self.count[name] else None


class _Group(NamedTuple):
    """One split and level."""

    sums: _Sums
    usage: Metric
    frechet: FrechetInceptionDistance | None


def _rfid(frechet: FrechetInceptionDistance, images: int, where: str) -> float | None:
    if images < 2:
        warnings.warn(f"rFID of {where} is left out: it needs two images, there is {images}", stacklevel=2)
        return None
    if images < NUM_FEATURES:
        warnings.warn(
            f"rFID of {where} comes from {images} images, fewer than its {NUM_FEATURES} features: it is too high and only "
            "compares tokenizers on the same images (papers use 50,000)",
            stacklevel=2,
        )
    return float(frechet.compute())


def _over_ranks(item: Any) -> list[Any]:
    """The items of all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [item]
    items: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


@contextmanager
def _no_warning_of_zeros() -> Iterator[None]:
    """Torchmetrics warns of a metric without updates; on a rank without images of some level that is no mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was called before the ``update``.*")
        yield
