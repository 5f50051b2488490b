"""Image-to-text documents: an image that is not trained on, then its caption. Reads the same shards as text-to-image."""

from collections.abc import Mapping

from nextflow.datamodules.packed import PackedDataModule
from nextflow.datamodules.text_to_image import image_then_caption
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.packing import Packing
from nextflow.sequence.scales import ScaleSchedule


class ImageToTextDataModule(PackedDataModule):
    """Image -> caption, packed, from document or token shards."""

    def __init__(
        self,
        *,
        shards: Mapping[str, str],
        text_tokenizer: str,
        codebook_size: int,
        level: int,
        batch_size: int = 32,
        schedule: ScaleSchedule = ScaleSchedule(),  # noqa: B008 (frozen)
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
            seed: of the order.
            max_bad_fraction: stop when more samples than this cannot be read.
        """
        super().__init__(
            arrange=image_then_caption,
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
