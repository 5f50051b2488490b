"""Codes of images while the transformer trains or answers: made of pixels by the frozen tokenizer, and self-corrected.

Pixels are encoded in float32 whatever the precision, so that codes made on the fly are those of token shards.
Only images that are trained on are self-corrected. At inference they are what the model has drawn itself, errors included;
the images of a prompt are encoded as they are, and so is in training what says `loss: false`.

Shapes: I images, N codes of all of them (or of one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nextflow.lightning_modules.tokenizer import to_signed
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.sequence.correction import CorrectedCodes, Correction
from nextflow.sequence.layout import PackedRows
from nextflow.sequence.scales import Grid, num_codes_of


def rows_with_codes(
    batch: Any, tokenizer: Tokenizer, code_offset: int, correction: Correction | None, device: torch.device
) -> PackedRows:
    """The rows of a PackedBatch, with codes for its images, and self-corrected codes for those that `correction` chooses.

    Raises ValueError when `correction` is given and the batch's token shards hold no corrected codes.
    """
    names = None
    if correction is not None:
        names = [name if loss else None for name, loss in zip(batch.image_names, batch.image_losses)]
    if batch.images:
        pairs = encode_pixels(tokenizer, batch.images, batch.grids, device, correction, names)
        input_N, target_N = (torch.cat(codes) for codes in zip(*pairs))
        return batch.rows.with_codes(target_N, code_offset, input_N)
    if correction is None or names is None or not any(names):
        return batch.rows
    if batch.corrected is None:
        raise ValueError(
            "SelfCorrection needs corrected codes, and these token shards have none: extract them with model.correction set "
            "(docs/data.md), or read document shards"
        )
    counts = torch.tensor([num_codes_of(grids) for grids in batch.grids], device=device)
    chosen_N = correction.chosen(correction.seeds([name or "" for name in names], device)).repeat_interleave(counts)
    plain_N, corrected = batch.rows.code_N, batch.corrected
    target_N, input_N = (torch.where(chosen_N, codes, plain_N) for codes in (corrected.target_N, corrected.input_N))
    return batch.rows.with_codes(target_N, code_offset, input_N)


def count_corrected(rows: PackedRows) -> Tensor:
    """float32 [2]: codes that are trained on and fed as another one than the target, and all that are trained on."""
    trained_N = rows.weight_BL.flatten()[rows.code_position_N] > 0
    return torch.stack([(trained_N & (rows.input_code_N != rows.code_N)).sum(), trained_N.sum()]).float()


@torch.no_grad()
def encode_pixels(
    tokenizer: Tokenizer,
    images: Sequence[Tensor],
    grids: Sequence[tuple[Grid, ...]],
    device: torch.device,
    correction: Correction | None = None,
    names: Sequence[str | None] | None = None,
) -> list[CorrectedCodes]:
    """Codes of uint8 images [3, H, W] of any mix of sizes, in their order; those of equal grids are encoded together.

    The tokenizer is no submodule of who owns it, so Lightning does not move it: this does.

    Args:
        correction: self-correction of images with a name.
        names: a name for each image, None where it is not to be corrected.
    """
    if next(tokenizer.parameters()).device != device:
        tokenizer.to(device)
    names = names if correction is not None and names is not None else [None] * len(images)
    groups: dict[tuple[tuple[Grid, ...], bool], list[int]] = {}
    for index, (of_image, name) in enumerate(zip(grids, names)):
        groups.setdefault((of_image, name is not None), []).append(index)
    codes: dict[int, CorrectedCodes] = {}
    with torch.autocast(device.type, enabled=False):
        for (of_image, corrected), indices in groups.items():
            images_BCHW = to_signed(torch.stack([images[index] for index in indices]).to(device))
            how, seed_B = None, None
            if corrected and correction is not None:
                how, seed_B = correction, correction.seeds([names[index] or "" for index in indices], device)
            encoding = tokenizer.encode(images_BCHW, of_image, how, seed_B)
            pairs = map(CorrectedCodes, encoding.input_codes_BN, encoding.target_codes_BN)
            codes.update(zip(indices, pairs))
    return [codes[index] for index in range(len(images))]
