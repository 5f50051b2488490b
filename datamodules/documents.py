"""Your own data as document shards: a file of JSON lines and a folder of images.

    python -m nextflow.datamodules.documents --rows rows.jsonl --images folder --output data/mine --check
    python -m nextflow.datamodules.documents --rows rows.jsonl --images folder --output data/mine

Each line is a document: a caption and its image, an edit, a question, a conversation, a text, or any list of texts and
images (`document_rows.py` shows the forms). A row that cannot be used is left out; `OUTPUT.rejected.jsonl` says for each why,
by its line number. `--check` reads everything and writes nothing but that file. The result appears at `output` when it is
complete, with `report.json`; after an interruption the same command starts again.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nextflow.datamodules.document_rows import BadRow, Row, TurnNames, parse_row
from nextflow.datamodules.pixels import decode_image
from nextflow.datamodules.streams import BROKEN
from nextflow.sequence.shards import ShardHeader, ShardWriter
from nextflow.sequence.text_tokenizer import train_text_tokenizer

# A fraction of bad rows means little before this many rows.
MIN_ROWS_OF_FRACTION = 100
# Rejected rows that report.json holds; all stand in OUTPUT.rejected.jsonl.
MAX_REPORTED = 100
SECONDS_OF_PROGRESS = 5.0


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """Which documents to write, and where to."""

    rows: str
    """File with one JSON object a line: a caption pair, edit, question, conversation, text, or any document."""
    output: str
    """Folder to write to; must not exist, unless it holds the same data already."""
    images: str | None = None
    """Folder that the files of images are relative to; that of the rows if not given."""
    validation_fraction: float = 0.05
    """Fraction of the rows that become the split `validation`, chosen by a hash of their images, or text."""
    text_tokenizer_size: int | None = None
    """Train a byte-level BPE of this many ids on the texts (at least 258); none if not given."""
    max_bad_fraction: float = 0.05
    """Stop with an error when more rows than this cannot be used."""
    max_aspect_ratio: float = 4.0
    """Longest side of an image by its shortest, as far as the schedule's base grids go; the paper's end at 4."""
    min_side: int = 16
    """Shortest side of an image in pixels; smaller ones hold nothing to learn."""
    turns: TurnNames = field(default_factory=TurnNames)
    """What stands in front of the turns of a conversation."""
    samples_per_shard: int = 4096
    """Rows per tar file."""
    source: str = "documents"
    """Name of the data in each record."""
    text: str = ""
    """Origin and licence, kept in the header of each shard."""


class _ReadRow(NamedTuple):
    number: int
    row: Row
    images: list[bytes]


def write_documents(config: DocumentsConfig) -> dict:
    """Writes the shards and returns the report.

    Raises:
        FileNotFoundError: the file of rows or the folder of images does not exist.
        ValueError: too many rows cannot be used, or `output` holds something else.
    """
    settings = _settings(config)
    output = Path(config.output)
    finished = output / "report.json"
    if finished.is_file() and json.loads(finished.read_text())["settings"] == settings:
        return json.loads(finished.read_text())
    if output.exists():
        raise ValueError(f"output: {output} exists and holds something else; name another folder or remove it")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    rows = _Rows(config)
    report = {"settings": settings, **_write_rows(config, rows, partial)}
    (partial / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    partial.rename(output)
    return report


def check_documents(config: DocumentsConfig) -> dict:
    """Reads every row and image, writes the rejected ones to `OUTPUT.rejected.jsonl`, and returns the counts.

    Raises:
        FileNotFoundError: the file of rows or the folder of images does not exist.
        ValueError: no row can be used.
    """
    _settings(config)
    rows = _Rows(config, stop_early=False)
    kinds = Counter(_kind(read.row) for read in rows)
    return {"usable": dict(kinds), **rows.report()}


def _settings(config: DocumentsConfig) -> dict[str, Any]:
    for name, path, found in (
        ("rows", config.rows, Path(config.rows).is_file()),
        ("images", _folder(config), _folder(config).is_dir()),
    ):
        if not found:
            raise FileNotFoundError(f"{name}: there is no {path}")
    digest = hashlib.sha256(Path(config.rows).read_bytes()).hexdigest()
    return {**asdict(config), "output": None, "sha256": digest, "pictures": _state_of(_folder(config))}


class _Rows:
    """The rows that can be used, with their images; counts and reports the others."""

    def __init__(self, config: DocumentsConfig, stop_early: bool = True):
        self.config, self.stop_early = config, stop_early
        self.path, self.rejected_path = Path(config.rows), Path(config.output + ".rejected.jsonl")
        self.num_rows = self.num_rejected = 0
        self.first_rejected: list[dict[str, Any]] = []

    def __iter__(self) -> Iterator[_ReadRow]:
        size, done, since = max(1, self.path.stat().st_size), 0, time.monotonic()
        self.rejected_path.parent.mkdir(parents=True, exist_ok=True)
        with self.rejected_path.open("w", encoding="utf-8") as rejected, self.path.open("rb") as lines:
            for number, data in enumerate(lines, 1):
                done += len(data)
                line = data.decode(errors="replace").strip()
                if not line:
                    continue
                self.num_rows += 1
                try:
                    row = parse_row(line, self.config.turns)
                    read = _ReadRow(number, row, [_read_image(name, self.config) for name in row.images])
                except BadRow as error:
                    rejected.write(json.dumps({"line": number, "reason": str(error), "row": line[:500]}) + "\n")
                    self._reject(number, str(error))
                else:
                    yield read
                if time.monotonic() - since > SECONDS_OF_PROGRESS:
                    since = time.monotonic()
                    print(f"{done / size:4.0%}: {self.num_rows} rows, {self.num_rejected} rejected", file=sys.stderr)
        if self.num_rejected == self.num_rows:
            raise ValueError(f"rows: no row of {self.path} can be used; {self._first()}")
        if self.stop_early:
            self.check(self.num_rows)
        if not self.num_rejected:
            self.rejected_path.unlink()

    def check(self, num_rows: int) -> None:
        """Raises ValueError if too many of `num_rows` were rejected."""
        if self.num_rejected > self.config.max_bad_fraction * num_rows:
            raise ValueError(
                f"{self.num_rejected} of {num_rows} rows of {self.path} cannot be used, more than `max_bad_fraction` = "
                f"{self.config.max_bad_fraction}; {self._first()}. {self.rejected_path} names all that were read"
            )

    def report(self) -> dict[str, Any]:
        """Counts, and the first of the rejected rows."""
        return {"rows": self.num_rows, "rejected": self.num_rejected, "skipped": self.first_rejected}

    def _reject(self, number: int, reason: str) -> None:
        self.num_rejected += 1
        if len(self.first_rejected) < MAX_REPORTED:
            self.first_rejected.append({"line": number, "reason": reason})
        if self.stop_early:
            self.check(max(self.num_rows, MIN_ROWS_OF_FRACTION))

    def _first(self) -> str:
        return "the first: " + "; ".join(f"line {row['line']}: {row['reason']}" for row in self.first_rejected[:5])


def _write_rows(config: DocumentsConfig, rows: _Rows, folder: Path) -> dict[str, Any]:
    header = ShardHeader(kind="documents", text=config.text)
    counts: Counter[str] = Counter()
    texts: list[str] = []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(folder / split, header=header, samples_per_shard=config.samples_per_shard)
            )
            for split in ("train", "validation")
            if split == "train" or config.validation_fraction > 0
        }
        for read in rows:
            # Rows of one image go into one split, whatever is said of it.
            name = "/".join(read.row.images or read.row.texts)
            split = "validation" if _hash(name) < config.validation_fraction else "train"
            files = {
                f"{place}{Path(name).suffix.lower()}": data
                for place, (name, data) in enumerate(zip(read.row.images, read.images))
            }
            writers[split].write(f"{read.number:09d}", _record(read.row, list(files), config.source), files)
            counts[split] += 1
            if split == "train":
                texts += read.row.texts
    if config.text_tokenizer_size is not None:
        train_text_tokenizer(texts, folder / "text_tokenizer", config.text_tokenizer_size)
    return {"splits": dict(counts), **rows.report()}


def _record(row: Row, files: list[str], source: str) -> dict[str, Any]:
    images = iter(files)
    segments: list[dict[str, Any]] = [
        {
            **({"image": next(images)} if segment.text is None else {"text": segment.text}),
            **({} if segment.loss else {"loss": False}),
        }
        for segment in row.segments
    ]
    return {"segments": segments, "source": source, "metadata": row.metadata}


def _read_image(name: str, config: DocumentsConfig) -> bytes:
    path = _folder(config) / name
    if not path.is_file():
        raise BadRow(f"{name}: there is no such file in {_folder(config)}")
    data = path.read_bytes()
    try:
        image = decode_image(data)
    except BROKEN as error:
        # Pillow names the buffer it was given, which tells a user nothing.
        reason = "its format is not known" if "cannot identify" in str(error) else str(error)
        raise BadRow(f"{name}: broken image, or none: {reason}") from error
    if min(image.size) < config.min_side:
        raise BadRow(f"{name}: its {image.width} x {image.height} pixels are fewer than `min_side` = {config.min_side}")
    if max(image.size) > config.max_aspect_ratio * min(image.size):
        raise BadRow(
            f"{name}: its {image.width} x {image.height} pixels are longer than `max_aspect_ratio` = "
            f"{config.max_aspect_ratio:g} allows; cut it, or raise the key if the schedule has such grids"
        )
    return data


def _kind(row: Row) -> str:
    """Its segments in words: "text, image"."""
    return ", ".join("image" if segment.text is None else "text" for segment in row.segments)


def _folder(config: DocumentsConfig) -> Path:
    return Path(config.rows).parent if config.images is None else Path(config.images)


def _state_of(folder: Path) -> str:
    """Changes when a file of the folder, or of a folder in it, does."""
    found = sorted(Path(root) / file for root, _, files in os.walk(folder) for file in files)
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def main() -> None:
    """Command line: every field of `DocumentsConfig`, from a YAML file or as options, and --check."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m nextflow.datamodules.documents", description=DocumentsConfig.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the options below.")
    parser.add_argument("--check", action="store_true", help="Read all rows and images and write no shards.")
    parser.add_class_arguments(DocumentsConfig)
    options = parser.instantiate(parser.parse_args()).as_dict()
    options.pop("config")
    check = options.pop("check")
    config = DocumentsConfig(**options)
    try:
        report = check_documents(config) if check else write_documents(config)
    except (ValueError, FileNotFoundError) as error:  # what is wrong with the user's files, in one line
        raise SystemExit(f"error: {error}") from error
    for row in report["skipped"]:
        print(f"line {row['line']}: {row['reason']}")
    if report["rejected"]:
        print(f"{report['rejected']} of {report['rows']} rows rejected; all of them: {config.output}.rejected.jsonl")
    if check:
        for form, count in report["usable"].items():
            print(f"usable: {count} rows ({form})")
        if report["rejected"] > config.max_bad_fraction * report["rows"]:
            raise SystemExit(
                f"error: more rows are rejected than `max_bad_fraction` = {config.max_bad_fraction} allows"
            )
    else:
        print(f"{config.output}: {', '.join(f'{count} {split}' for split, count in report['splits'].items())}")


if __name__ == "__main__":
    main()
