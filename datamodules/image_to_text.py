"""Image-to-text documents: an image that is not trained on, then its caption. Reads the same shards as text-to-image.

A question about the image says `loss: false` in the record, so that the answer alone is trained on.
"""

from dataclasses import dataclass

from nextflow.datamodules.arrangements import Arrangement, ImageThenCaption
from nextflow.datamodules.packed import PackedDataModule


@dataclass(kw_only=True, eq=False, repr=False)
class ImageToTextDataModule(PackedDataModule):
    """Image -> caption or answer, packed, from document or token shards."""

    def arrange(self) -> dict[str, Arrangement]:
        return {"": ImageThenCaption()}
