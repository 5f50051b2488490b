"""Interleaved documents: texts and images in any order, as stories, examples in context and conversations are (NextFlow 11).

What is not to be trained on, such as the turns of a user, says `loss: false` in the record.
"""

from dataclasses import dataclass

from nextflow.datamodules.arrangements import Arrangement, AsStored
from nextflow.datamodules.packed import PackedDataModule


@dataclass(kw_only=True, eq=False, repr=False)
class InterleavedDataModule(PackedDataModule):
    """Texts and images in stored order, packed, from document or token shards."""

    max_images: int | None = None
    """Documents end with this image; the paper has 5 at level 512 and 3 at 1024. All if not given."""
    text_loss: bool = True
    """Whether texts are trained on."""

    def arrange(self) -> dict[str, Arrangement]:
        return {"": AsStored(max_images=self.max_images, text_loss=self.text_loss)}
