"""Sheets of pictures with captions under them, drawn with Pillow alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_MARGIN = 6
_FONT_SIZE = 12
_LINE_HEIGHT = 15


class Cell(NamedTuple):
    """One place of a sheet."""

    pixels_HWC: np.ndarray | None
    """uint8; None leaves room for the text alone."""
    caption: str = ""
    is_right: bool | None = None
    """Draws a frame and a mark: a green tick, a red cross; None draws neither."""


def draw_sheet(
    rows: Sequence[Sequence[Cell]], *, header: Sequence[str] = (), side: int = 128, caption_lines: int = 3
) -> Image.Image:
    """Draw rows of cells.

    Args:
        rows: cells from left to right; rows may differ in length.
        header: words above the columns.
        side: pixels that the longer side of every picture is resized to.
        caption_lines: lines of text below each picture; the rest of a longer caption is cut.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    has_captions = any(cell.caption and cell.pixels_HWC is not None for row in rows for cell in row)
    text_height = caption_lines * _LINE_HEIGHT if has_captions else 0
    step_x, step_y = side + 2 * _MARGIN, side + 2 * _MARGIN + text_height
    top = _LINE_HEIGHT + _MARGIN if header else 0
    num_columns = max([len(header), *(len(row) for row in rows)], default=0)
    sheet = Image.new("RGB", (max(1, num_columns * step_x), max(1, top + len(rows) * step_y)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, words in enumerate(header):
        draw.text((column * step_x + _MARGIN, _MARGIN), words, fill="black", font=font)
    for index, row in enumerate(rows):
        for column, cell in enumerate(row):
            x, y = column * step_x + _MARGIN, top + index * step_y + _MARGIN
            if cell.pixels_HWC is not None:
                picture = _fit(cell.pixels_HWC, side)
                sheet.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2))
                if cell.is_right is not None:
                    _mark(draw, x, y, side, cell.is_right)
                y += side + 2
            lines = _wrap(cell.caption, side, font)[: caption_lines if cell.pixels_HWC is not None else None]
            draw.multiline_text((x, y), "\n".join(lines), fill="black", font=font, spacing=2)
    return sheet


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, side: int, is_right: bool) -> None:
    colour = "#1a9641" if is_right else "#d7191c"
    draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), outline=colour, width=3)
    left, top = x + side - 16, y
    draw.rectangle((left, top, left + 15, top + 15), fill=colour)
    strokes = ((3, 8, 6, 12), (6, 12, 12, 3)) if is_right else ((3, 3, 12, 12), (3, 12, 12, 3))
    for x0, y0, x1, y1 in strokes:
        draw.line((left + x0, top + y0, left + x1, top + y1), fill="white", width=2)


def _fit(pixels_HWC: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(pixels_HWC)
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _wrap(text: str, width: int, font) -> list[str]:
    """Break between words so that lines fit; a longer word stands alone."""
    # Pillow's own font has no accents: "piñata" is drawn as "pinata".
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    lines: list[str] = []
    for word in plain.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
