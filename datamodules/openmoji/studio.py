"""Draws OpenMoji: single drawings as PNG files, and several of them composed on one canvas."""

import io
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from PIL import Image

Colour = tuple[int, int, int]

BACKGROUNDS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "light blue": (205, 232, 250),
    "pink": (250, 214, 226),
    "yellow": (255, 243, 176),
    "light green": (214, 240, 202),
    "purple": (222, 209, 241),
    "orange": (255, 218, 180),
    "grey": (214, 214, 214),
}
"""Paper that drawings stand on. Pale, so that every drawing of any colour stands out by its black lines."""

# Tiles that are kept drawn: at 64 pixels some 30 MB.
MAX_TILES = 8192


class Placed(NamedTuple):
    """A drawing on a canvas."""

    hexcode: str
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels: the square that the drawing was drawn into, its margin included."""


class Studio:
    """Draws from a folder of SVG files. The same calls always give the same pixels."""

    def __init__(self, folder: Path, size: int, drawn: Mapping[str, bytes] | None = None):
        """
        Args:
            folder: of the SVG files, named by hexcode.
            size: side of single drawings in pixels.
            drawn: PNG files of single drawings that were drawn before.
        """
        self.folder = folder
        self.size = size
        self._drawn = dict(drawn or {})
        self._tiles: dict[tuple[str, int], Image.Image] = {}

    def png(self, hexcode: str) -> bytes:
        """PNG file of one drawing on white."""
        if hexcode not in self._drawn:
            self._drawn[hexcode] = draw_png(self.folder / f"{hexcode}.svg", self.size)
        return self._drawn[hexcode]

    def compose(self, size: tuple[int, int], background: str, objects: tuple[Placed, ...]) -> bytes:
        """PNG file of drawings on a canvas.

        Args:
            size: height and width in pixels.
            background: a name of `BACKGROUNDS`.
            objects: in the order in which they are drawn.
        """
        canvas = Image.new("RGB", (size[1], size[0]), BACKGROUNDS[background])
        for hexcode, (left, top, right, _) in objects:
            tile = self._tile(hexcode, right - left)
            canvas.paste(tile, (left, top), tile)
        return encode_png(canvas)

    def _tile(self, hexcode: str, size: int) -> Image.Image:
        """A drawing on nothing."""
        tile = self._tiles.get((hexcode, size))
        if tile is None:
            tile = Image.open(io.BytesIO(draw_png(self.folder / f"{hexcode}.svg", size, None))).convert("RGBA")
            if len(self._tiles) >= MAX_TILES:
                self._tiles.clear()
            self._tiles[hexcode, size] = tile
        return tile


def draw_png(path: Path, size: int, background: str | None = "#ffffff") -> bytes:
    """PNG file of an SVG file.

    Args:
        path: the SVG file.
        size: side in pixels.
        background: colour behind the drawing; transparent if None.

    Raises:
        ValueError, OSError: it cannot be drawn.
    """
    # No text in these drawings: system fonts would only cost start-up time.
    image = import_module("resvg_py").svg_to_bytes(
        svg_path=str(path), width=size, height=size, background=background, skip_system_fonts=True
    )
    return bytes(image)


def encode_png(image: Image.Image) -> bytes:
    """A PNG file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
