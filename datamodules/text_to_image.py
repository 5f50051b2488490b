"""Text-to-image documents: a caption, then its image (NextFlow 3.1).

Two things are random in training. A caption is dropped, so that the model also learns images without a caption, which
classifier-free guidance needs. A document is turned around into image -> caption, so that understanding is not lost
(NextFlow 6.7: 10 %).
"""

from dataclasses import dataclass

from nextflow.datamodules.arrangements import Arrangement, CaptionThenImage
from nextflow.datamodules.packed import PackedDataModule


@dataclass(kw_only=True, eq=False, repr=False)
class TextToImageDataModule(PackedDataModule):
    """Caption -> image, packed, from document or token shards."""

    caption_dropout: float = 0.1
    """Fraction of documents that lose their caption in training."""
    captioning_probability: float = 0.0
    """Fraction of documents that become image -> caption in training; the paper has 0.1."""
    text_loss: bool = True
    """Whether captions in front of their image are trained on."""

    def arrange(self) -> dict[str, Arrangement]:
        return {
            "": CaptionThenImage(
                caption_dropout=self.caption_dropout,
                captioning_probability=self.captioning_probability,
                text_loss=self.text_loss,
            )
        }
