"""From image files to pixels."""

import io

from PIL import Image

from nextflow.datamodules.streams import Sample
from nextflow.sequence.pixels import Box, as_rgb, crop_box, fit_image

__all__ = ["Box", "ImageCache", "crop_box", "decode_image", "fit_image"]


class ImageCache:
    """Decoded images up to a size in memory; what does not fit is decoded again each time."""

    def __init__(self, megabytes: int):
        self.free = megabytes * 2**20
        self._images: dict[tuple[str, str, str], Image.Image] = {}

    def read(self, sample: Sample, name: str) -> Image.Image:
        """One image of a sample, as RGB.

        Raises:
            OSError, SyntaxError, ValueError: it is broken.
        """
        key = (str(sample.shard.path), sample.key, name)
        image = self._images.get(key)
        if image is None:
            image = decode_image(sample.shard.read(sample.key, name))
            size = 3 * image.width * image.height
            if size <= self.free:
                self.free -= size
                self._images[key] = image
        return image


def decode_image(data: bytes) -> Image.Image:
    """An image file as `as_rgb` gives it.

    Raises:
        OSError, SyntaxError, ValueError: it is broken, or holds floats.
    """
    return as_rgb(Image.open(io.BytesIO(data)))
