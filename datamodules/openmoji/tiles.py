"""Writes the drawings of composed scenes as single files, for rewards that look for them in generated pictures.

    python -m nextflow.datamodules.openmoji.tiles --output runs/openmoji/tiles

OUTPUT/HEXCODE.png is a drawing on nothing, OUTPUT/tiles.json maps hexcodes to noun, kind and colour. OpenMoji is CC BY-SA 4.0.
"""

import json
from pathlib import Path

from nextflow.datamodules.openmoji.catalogue import load_catalogue
from nextflow.datamodules.openmoji.studio import draw_png
from nextflow.datamodules.openmoji.things import things_of


def write_tiles(output: str, size: int = 96) -> int:
    """Draw all things of composed scenes.

    Args:
        output: folder to write.
        size: side of each drawing in pixels.

    Returns:
        how many were drawn.
    """
    catalogue = load_catalogue()
    things = things_of(catalogue.drawings)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for thing in things:
        hexcode = thing.drawing.hexcode
        (folder / f"{hexcode}.png").write_bytes(draw_png(catalogue.folder / f"{hexcode}.svg", size, None))
    facts = {
        thing.drawing.hexcode: {"noun": thing.noun, "kind": thing.kind, "colour": thing.colour} for thing in things
    }
    (folder / "tiles.json").write_text(json.dumps(facts, indent=1))
    return len(things)


def main() -> None:
    """Command line."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m nextflow.datamodules.openmoji.tiles", description=__doc__)
    parser.add_function_arguments(write_tiles)
    given = parser.parse_args()
    print(f"{given.output}: {write_tiles(given.output, given.size)} drawings")


if __name__ == "__main__":
    main()
