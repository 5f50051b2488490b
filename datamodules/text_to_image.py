"""Text-to-image documents: a caption, then its image (NextFlow 3.1).

Two things are random in training. A caption is dropped, so that the model also learns images without a caption, which
classifier-free guidance needs. A document is turned around into image -> caption, so that understanding is not lost
(NextFlow 6.7: 10 %).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from nextflow.datamodules.packed import PackedDataModule, Part
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.packing import Packing
from nextflow.sequence.scales import ScaleSchedule


class TextToImageDataModule(PackedDataModule):
    """Caption -> image, packed, from document or token shards."""

    def __init__(
        self,
        *,
        shards: Mapping[str, str],
        text_tokenizer: str,
        codebook_size: int,
        level: int,
        batch_size: int = 32,
        schedule: ScaleSchedule = ScaleSchedule(),  # noqa: B008 (frozen)
        caption_dropout: float = 0.1,
        captioning_probability: float = 0.0,
        text_loss: bool = True,
        layout: LayoutConfig = LayoutConfig(),  # noqa: B008 (frozen)
        packing: Packing = "padded",
        max_length: int | None = None,
        batches_per_epoch: int | None = None,
        validation_splits: list[str] = ["validation"],  # noqa: B006 (jsonargparse copies)
        test_splits: list[str] = ["validation"],  # noqa: B006
        predict_splits: list[str] | None = None,
        window_shards: int = 16,
        cache_megabytes: int = 512,
        num_workers: int = 0,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
    ):
        """
        Args:
            shards: split -> glob pattern; `{level}` in it stands for the level.
            text_tokenizer: local folder of a Hugging Face tokenizer.
            codebook_size: number of codes of the image tokenizer.
            level: level to train at; a ResolutionCurriculum sets it per stage.
            batch_size: documents (padded) or rows (fixed_length) per batch and device.
            schedule: scale schedule.
            caption_dropout: fraction of documents that lose their caption in training.
            captioning_probability: fraction of documents that become image -> caption in training; the paper has 0.1.
            text_loss: whether captions in front of their image are trained on.
            layout: positions, weights and resizing of the sequence.
            packing: padded (one document per row) or fixed_length (rows of max_length, filled with documents).
            max_length: positions of a row; longer documents are skipped.
            batches_per_epoch: training batches of an epoch; one pass over the data if not given (padded only).
            validation_splits: splits of validation.
            test_splits: splits of `test`.
            predict_splits: splits of `predict`; all of `shards` if not given.
            window_shards: shards that are shuffled together.
            cache_megabytes: memory for decoded documents, per process.
            num_workers: loader processes.
            seed: of order, dropout and captioning.
            max_bad_fraction: stop when more samples than this cannot be read.
        """
        for name, value in (("caption_dropout", caption_dropout), ("captioning_probability", captioning_probability)):
            if not 0 <= value <= 1:
                raise ValueError(f"data.{name} must lie in [0, 1], not {value}")
        super().__init__(
            arrange=CaptionThenImage(
                caption_dropout=caption_dropout,
                captioning_probability=captioning_probability,
                text_loss=text_loss,
            ),
            shards=shards,
            text_tokenizer=text_tokenizer,
            codebook_size=codebook_size,
            schedule=schedule,
            level=level,
            batch_size=batch_size,
            layout=layout,
            packing=packing,
            max_length=max_length,
            batches_per_epoch=batches_per_epoch,
            validation_splits=validation_splits,
            test_splits=test_splits,
            predict_splits=predict_splits,
            window_shards=window_shards,
            cache_megabytes=cache_megabytes,
            num_workers=num_workers,
            seed=seed,
            max_bad_fraction=max_bad_fraction,
        )


@dataclass(frozen=True, kw_only=True)
class CaptionThenImage:
    """Keeps the stored order, or drops the caption, or turns the document around."""

    caption_dropout: float
    captioning_probability: float
    text_loss: bool

    def __call__(self, parts: list[Part], draw: random.Random | None) -> list[Part]:
        # Both are always drawn, so that changing one probability does not change the other's outcome.
        turned = draw is not None and draw.random() < self.captioning_probability
        dropped = draw is not None and draw.random() < self.caption_dropout
        if turned:
            return image_then_caption(parts)
        if dropped:
            return [part for part in parts if not part.is_text]
        return parts if self.text_loss else [part.with_loss(False) if part.is_text else part for part in parts]


def image_then_caption(parts: list[Part], draw: random.Random | None = None) -> list[Part]:
    """Images first and not trained on, then the texts."""
    images = [part.with_loss(False) for part in parts if not part.is_text]
    return images + [part for part in parts if part.is_text]
