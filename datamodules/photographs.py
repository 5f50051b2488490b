"""Crops of real photographs, as document shards: the colour photographs inside of the packages scikit-image and scikit-learn.

    python -m nextflow.datamodules.photographs --config configs/photographs/data.yaml

Writes `output/{train,validation}/000000.tar` (square crops), the photographs themselves as `output/whole/{train,validation}/*`
(for `image_folder.py`), `ATTRIBUTION.txt` and, last of all, `report.json`. If a report with the same settings is there already,
nothing is done. Nothing is downloaded: only files that the installed packages hold are read.

Whole photographs are held out for validation, so no crop of training shows a scene of validation. A crop is a square of the
photograph whose side is drawn evenly in log between `size` (pixels as they are) and the photograph's shorter side, scaled to
`size` with antialiasing. Every draw is a function of the seed, the photograph and the crop's number.
"""

import io
import json
import random
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from nextflow.datamodules.pixels import Box, decode_image
from nextflow.sequence.shards import ShardHeader, ShardWriter

SPLITS = ("train", "validation")
PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


class Photograph(NamedTuple):
    """One photograph of a package; source and licence as the package states them."""

    name: str
    split: str
    module: str
    file: str
    source: str
    licence: str


PHOTOGRAPHS = (
    Photograph(
        "astronaut", "train", "skimage", "data/astronaut.png",
        "Eileen Collins, NASA Great Images (https://flic.kr/p/r9qvLn)", "public domain",
    ),
    Photograph("chelsea", "validation", "skimage", "data/chelsea.png", "Chelsea the cat, by Stefan van der Walt", "CC0"),
    Photograph(
        "china", "validation", "sklearn", "datasets/images/china.jpg",
        "danielbuechele (https://www.flickr.com/photos/danielbuechele/6061409035/)", "CC BY 2.0",
    ),
    Photograph("coffee", "train", "skimage", "data/coffee.png", "Coffee cup, by Rachel Michetti, Pikolo Espresso Bar", "CC0"),
    Photograph(
        "flower", "train", "sklearn", "datasets/images/flower.jpg",
        "vultilion (https://www.flickr.com/photos/vultilion/6056698931/)", "CC BY 2.0",
    ),
    Photograph(
        "hubble_deep_field", "train", "skimage", "data/hubble_deep_field.jpg",
        "Hubble eXtreme Deep Field, NASA (http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/)",
        "public domain",
    ),
    Photograph(
        "motorcycle", "train", "skimage", "data/motorcycle_left.png",
        "Middlebury stereo benchmark 2014, D. Scharstein et al. (http://vision.middlebury.edu/stereo/data/scenes2014/)",
        "not stated by the package",
    ),
    Photograph(
        "retina", "train", "skimage", "data/retina.jpg",
        "Fundus of a left eye, by Mikael H\u00e4ggstr\u00f6m "
        "(https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg)", "CC0",
    ),
    Photograph(
        "rocket", "train", "skimage", "data/rocket.jpg",
        "DSCOVR on Falcon 9, SpaceX (https://www.flickr.com/photos/spacexphotos/16511594820/)", "public domain",
    ),
)  # fmt: skip
"""The everyday, astronomical and medical colour photographs; of the stereo pair the left one, as the right shows the same."""


@dataclass(frozen=True, kw_only=True)
class PhotographsConfig:
    """Which crops to cut and where to write them."""

    output: str
    """Folder to write to."""
    size: int = 64
    """Side of the crops in pixels: the highest level that is trained."""
    train_crops: int = 512
    """Crops of each photograph of training."""
    validation_crops: int = 128
    """Crops of each photograph that is held out."""
    seed: int = 0
    """Seed of the crops. Splits do not depend on it."""
    samples_per_shard: int = 4096
    """Crops per tar file."""


def make_photographs(config: PhotographsConfig) -> dict:
    """Cuts the crops and returns the report.

    Raises:
        ModuleNotFoundError: the extra `photographs` is not installed.
        FileNotFoundError: the installed version of a package lacks a photograph.
        ValueError: no or negative numbers, or crops larger than a photograph.
    """
    if min(config.size, config.train_crops, config.validation_crops) < 1:
        raise ValueError("size, train_crops and validation_crops must be at least 1")
    output = Path(config.output)
    files = {photograph.name: _file_of(photograph, config.size) for photograph in PHOTOGRAPHS}
    versions = {name: metadata.version(name) for name in PACKAGES.values()}
    settings = {**{name: value for name, value in asdict(config).items() if name != "output"}, "versions": versions}
    finished = output / "report.json"
    if finished.is_file() and json.loads(finished.read_text())["settings"] == settings:
        return json.loads(finished.read_text())
    _clear(output)

    counts = {"train": config.train_crops, "validation": config.validation_crops}
    for split in SPLITS:
        members = [photograph for photograph in PHOTOGRAPHS if photograph.split == split]
        header = ShardHeader(kind="documents", text=attribution(members))
        (output / "whole" / split).mkdir(parents=True)
        with ShardWriter(output / split, header=header, samples_per_shard=config.samples_per_shard) as writer:
            for photograph in members:
                file = files[photograph.name]
                shutil.copyfile(file, output / "whole" / split / f"{photograph.name}{file.suffix}")
                _write_crops(photograph, decode_image(file.read_bytes()), counts[split], config, writer)
    (output / "ATTRIBUTION.txt").write_text(attribution(list(PHOTOGRAPHS)) + "\n", encoding="utf-8")
    report = {
        "settings": settings,
        "splits": {split: sum(counts[split] for one in PHOTOGRAPHS if one.split == split) for split in SPLITS},
        "photographs": {photograph.name: photograph._asdict() for photograph in PHOTOGRAPHS},
    }
    # Written last: a report means that everything else is complete.
    partial = output / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1))
    partial.replace(finished)
    return report


def attribution(photographs: list[Photograph]) -> str:
    """Sources and licences, a line for each photograph."""
    lines = [
        f"{photograph.name}: {photograph.source}. Licence: {photograph.licence}. From {PACKAGES[photograph.module]}."
        for photograph in photographs
    ]
    return "Photographs, cut into squares and scaled:\n" + "\n".join(lines)


def _write_crops(
    photograph: Photograph, image: Image.Image, count: int, config: PhotographsConfig, writer: ShardWriter
) -> None:
    for number in range(count):
        key = f"{photograph.name}-{number:05d}"
        box = _box(image, config.size, random.Random(f"{config.seed}/{key}"))
        crop = image.resize((config.size, config.size), Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        crop.save(buffer, "PNG")
        details = {"photograph": photograph.name, "box": [round(side, 2) for side in box]}
        record = {"segments": [{"image": "0.png"}], "source": "photographs", "metadata": details}
        writer.write(key, record, {"0.png": buffer.getvalue()})


def _box(image: Image.Image, size: int, draw: random.Random) -> Box:
    side = size * (min(image.size) / size) ** draw.random()
    left, top = (image.width - side) * draw.random(), (image.height - side) * draw.random()
    # Rounding must not push the box over the edge: PIL refuses it.
    return left, top, min(left + side, image.width), min(top + side, image.height)


def _file_of(photograph: Photograph, size: int) -> Path:
    package = PACKAGES[photograph.module]
    spec = find_spec(photograph.module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"{package} is not installed: in the folder of NextFlow, pip install -e '.[photographs]'"
        )
    path = Path(spec.origin).parent / photograph.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{package} {metadata.version(package)} does not hold {photograph.file}; install a newer one"
        )
    with Image.open(path) as image:
        if size > min(image.size):
            raise ValueError(f"size {size} is larger than the photograph {photograph.name} of {image.size} pixels")
    return path


def _clear(output: Path) -> None:
    """Removes what an earlier run left, and only that."""
    (output / "report.json").unlink(missing_ok=True)
    for split in SPLITS:
        for pattern in ("*.tar", "*.tar.partial"):
            for path in (output / split).glob(pattern):
                path.unlink()
    shutil.rmtree(output / "whole", ignore_errors=True)


def main() -> None:
    """Command line: every field of `PhotographsConfig`, from a YAML file or as options."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m nextflow.datamodules.photographs", description=PhotographsConfig.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the options below.")
    parser.add_class_arguments(PhotographsConfig)
    config = parser.parse_args().as_dict()
    config.pop("config")
    try:
        report = make_photographs(PhotographsConfig(**config))
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:  # the user's to mend, in one line
        raise SystemExit(f"error: {error}") from error
    splits = ", ".join(f"{count} {split}" for split, count in report["splits"].items())
    print(f"{config['output']}: {splits} crops of {len(PHOTOGRAPHS)} photographs")


if __name__ == "__main__":
    main()
