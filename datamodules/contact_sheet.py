"""A picture of documents, to look at data before it is trained on: each row is a document, its texts and images in order.

    python -m nextflow.datamodules.contact_sheet --shards "data/mine/train/*.tar" --output sheet.png

What is not trained on (`loss: false`) stands on grey.
"""

import io
import random
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from nextflow.datamodules.pixels import decode_image
from nextflow.datamodules.streams import find_shards
from nextflow.sequence.shards import Shard, open_shard

_GAP, _LINE, _FONT = 4, 14, 11
_LEARNT, _GIVEN = "#ffffff", "#dddddd"


@dataclass(frozen=True, kw_only=True)
class ContactSheetConfig:
    """Which documents to draw, and where to."""

    shards: list[str]
    """Glob patterns of document shards; `num_documents` are drawn of each."""
    output: str
    """The PNG file to write."""
    num_documents: int = 8
    """Documents of each pattern, drawn with `seed`."""
    side: int = 64
    """Height of the images in pixels."""
    text_width: int = 24
    """Letters in a line of text."""
    columns: int = 1
    """Documents side by side."""
    seed: int = 0
    """Of the choice."""


def draw_contact_sheet(config: ContactSheetConfig) -> Image.Image:
    """The sheet.

    Raises:
        FileNotFoundError: no shard matches a pattern.
        ValueError: a shard holds codes, which only their tokenizer can draw.
    """
    cells = []
    for pattern in config.shards:
        shards = [open_shard(path) for path in find_shards(pattern, "shards", "see docs/data.md")]
        for shard in shards:
            if shard.header.kind != "documents":
                raise ValueError(
                    f"shards: {shard.path} holds {shard.header.kind}; draw the documents that it was made of"
                )
        samples = [(shard, key) for shard in shards for key in shard.keys]
        chosen = random.Random(config.seed).sample(samples, min(config.num_documents, len(samples)))
        cells += [_document(shard, key, config) for shard, key in chosen]
    if not cells:
        raise ValueError("shards: they hold no document")
    rows = [cells[start : start + config.columns] for start in range(0, len(cells), config.columns)]
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(len(rows[0]))]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + _GAP * len(widths), sum(heights) + _GAP * len(heights)), "#888888")
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            place = sum(widths[:column]) + _GAP * column, sum(heights[:number]) + _GAP * number
            sheet.paste(cell, place)
    return sheet


def _document(shard: Shard, key: str, config: ContactSheetConfig) -> Image.Image:
    """Segments side by side."""
    parts = [_segment(shard, key, segment, config) for segment in shard.record(key)["segments"]]
    size = sum(part.width + _GAP for part in parts), max(part.height for part in parts)
    strip = Image.new("RGB", size, "#888888")
    left = 0
    for part in parts:
        strip.paste(part, (left, 0))
        left += part.width + _GAP
    return strip


def _segment(shard: Shard, key: str, segment: dict[str, Any], config: ContactSheetConfig) -> Image.Image:
    background = _LEARNT if segment.get("loss", True) else _GIVEN
    if "image" in segment:
        image = decode_image(shard.read(key, segment["image"])).convert("RGB")
        image = image.resize((max(1, round(image.width * config.side / image.height)), config.side))
        framed = Image.new("RGB", (image.width + 2 * _GAP, image.height + 2 * _GAP), background)
        framed.paste(image, (_GAP, _GAP))
        return framed
    font = ImageFont.load_default(_FONT)
    lines = textwrap.wrap(segment["text"].strip(), config.text_width) or [""]
    width = max(round(font.getlength(line)) for line in lines) + 2 * _GAP
    words = Image.new("RGB", (width, max(config.side + 2 * _GAP, _LINE * len(lines) + _GAP)), background)
    ImageDraw.Draw(words).multiline_text((_GAP, 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return words


def main() -> None:
    """Command line: every field of `ContactSheetConfig`."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m nextflow.datamodules.contact_sheet", description=ContactSheetConfig.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the options below.")
    parser.add_class_arguments(ContactSheetConfig)
    options = parser.instantiate(parser.parse_args()).as_dict()
    options.pop("config")
    config = ContactSheetConfig(**options)
    try:
        sheet = draw_contact_sheet(config)
    except (ValueError, FileNotFoundError) as error:  # the user's to mend, in one line
        raise SystemExit(f"error: {error}") from error
    buffer = io.BytesIO()
    sheet.quantize(256).save(buffer, "PNG", optimize=True)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    Path(config.output).write_bytes(buffer.getvalue())
    print(f"{config.output}: {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    main()
