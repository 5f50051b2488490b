"""Your own captioned images as document shards:

    python -m nextflow.datamodules.documents --captions captions.jsonl --images folder --output data/mine

Each line of the captions file is {"file": "cat.png", "caption": "a cat"}; other keys are kept as metadata. A row that cannot be
used is reported by its line number and left out. The result appears at `output` when it is complete, with `report.json`.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nextflow.datamodules.pixels import decode_image
from nextflow.sequence.shards import ShardHeader, ShardWriter
from nextflow.sequence.text_tokenizer import train_text_tokenizer

# A fraction of bad rows means little before this many rows.
MIN_ROWS_OF_FRACTION = 100


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """Which captioned images to write, and where to."""

    captions: str
    """File with one JSON object a line: {"file": ..., "caption": ...}."""
    images: str
    """Folder that the files are relative to."""
    output: str
    """Folder to write to; must not exist, unless it holds the same data already."""
    validation_fraction: float = 0.05
    """Fraction of the rows that become the split `validation`, chosen by a hash of the file's name."""
    text_tokenizer_size: int | None = None
    """Train a byte-level BPE of this many ids on the captions (at least 258); none if not given."""
    max_bad_fraction: float = 0.05
    """Stop with an error when more rows than this cannot be used."""
    samples_per_shard: int = 4096
    """Rows per tar file."""
    source: str = "documents"
    """Name of the data in each record."""
    text: str = ""
    """Origin and licence, kept in the header of each shard."""


class _Row(NamedTuple):
    key: str
    file: str
    record: dict[str, Any]
    image: bytes


class _BadRow(ValueError):
    pass


def write_documents(config: DocumentsConfig) -> dict:
    """Writes the shards and returns the report.

    Raises:
        FileNotFoundError: the captions file or the folder of images does not exist.
        ValueError: too many rows cannot be used, or `output` holds something else.
    """
    captions, output = Path(config.captions), Path(config.output)
    for name, path, found in (
        ("captions", captions, captions.is_file()),
        ("images", Path(config.images), Path(config.images).is_dir()),
    ):
        if not found:
            raise FileNotFoundError(f"{name}: there is no {path}")
    settings = {**asdict(config), "output": None, "sha256": hashlib.sha256(captions.read_bytes()).hexdigest()}
    settings["pictures"] = _state_of(Path(config.images))
    finished = output / "report.json"
    if finished.is_file() and json.loads(finished.read_text())["settings"] == settings:
        return json.loads(finished.read_text())
    if output.exists():
        raise ValueError(f"output: {output} exists and holds something else; name another folder or remove it")

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    report = {"settings": settings, **_write_rows(config, partial)}
    (partial / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    partial.rename(output)
    return report


def _write_rows(config: DocumentsConfig, folder: Path) -> dict:
    header = ShardHeader(kind="documents", text=config.text)
    counts: Counter[str] = Counter()
    skipped: list[dict[str, Any]] = []
    texts: list[str] = []
    number = 0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(folder / split, header=header, samples_per_shard=config.samples_per_shard)
            )
            for split in ("train", "validation")
            if split == "train" or config.validation_fraction > 0
        }
        for number, line in _lines(Path(config.captions)):
            try:
                row = _read_row(number, line, config)
            except _BadRow as error:
                skipped.append({"line": number, "reason": str(error)})
                _check(skipped, max(number, MIN_ROWS_OF_FRACTION), config)
                continue
            split = "validation" if _hash(row.file) < config.validation_fraction else "train"
            writers[split].write(row.key, row.record, {f"0{Path(row.file).suffix.lower()}": row.image})
            counts[split] += 1
            if split == "train":
                texts.append(row.record["segments"][0]["text"])
        if not counts:
            raise ValueError(f"captions: no row of {config.captions} can be used; {_first(skipped)}")
        _check(skipped, number, config)
    if config.text_tokenizer_size is not None:
        train_text_tokenizer(texts, folder / "text_tokenizer", config.text_tokenizer_size)
    return {"splits": dict(counts), "skipped": skipped}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _read_row(number: int, line: str, config: DocumentsConfig) -> _Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise _BadRow(f"not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("file"), str):
        raise _BadRow('no "file"')
    file, caption = values["file"], values.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise _BadRow(f"{file}: empty caption")
    path = Path(config.images) / file
    if not path.is_file():
        raise _BadRow(f"{file}: there is no such file in {config.images}")
    data = path.read_bytes()
    try:
        decode_image(data)
    except (OSError, SyntaxError, ValueError) as error:
        raise _BadRow(f"{file}: broken image, or none: {_reason(error)}") from error
    record = {
        "segments": [{"text": caption.strip()}, {"image": f"0{path.suffix.lower()}"}],
        "source": config.source,
        "metadata": {"caption": caption.strip(), **{name: values[name] for name in values if name != "caption"}},
    }
    return _Row(f"{number:09d}", file, record, data)


def _check(skipped: list[dict[str, Any]], num_rows: int, config: DocumentsConfig) -> None:
    if len(skipped) > config.max_bad_fraction * num_rows:
        raise ValueError(
            f"{len(skipped)} of {num_rows} rows of {config.captions} cannot be used, more than `max_bad_fraction` = "
            f"{config.max_bad_fraction}; {_first(skipped)}"
        )


def _first(skipped: list[dict[str, Any]]) -> str:
    return "the first: " + "; ".join(f"line {row['line']}: {row['reason']}" for row in skipped[:5])


def _state_of(folder: Path) -> str:
    """Changes when a file of the folder does."""
    files = sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder))
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _reason(error: Exception) -> str:
    """Pillow names the buffer it was given, which tells a user nothing."""
    return "its format is not known" if "cannot identify" in str(error) else str(error)


def _hash(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def main() -> None:
    """Command line: every field of `DocumentsConfig`, from a YAML file or as options."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m nextflow.datamodules.documents", description=DocumentsConfig.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with the options below.")
    parser.add_class_arguments(DocumentsConfig)
    config = parser.parse_args().as_dict()
    config.pop("config")
    try:
        report = write_documents(DocumentsConfig(**config))
    except (ValueError, FileNotFoundError) as error:  # what is wrong with the user's files, in one line
        raise SystemExit(f"error: {error}") from error
    for row in report["skipped"]:
        print(f"skipped line {row['line']}: {row['reason']}")
    print(f"{config['output']}: {', '.join(f'{count} {split}' for split, count in report['splits'].items())}")


if __name__ == "__main__":
    main()
