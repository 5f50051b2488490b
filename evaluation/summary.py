"""The result of a run as one picture and one table.

    python -m nextflow.evaluation.summary --run runs/quickstart

Reads, below the run's folder, whatever of this is there, and reports what is missing:

    data/{train,validation,compositional}/*.tar   the drawings
    generate/, reconstruct/                       pictures and samples.jsonl of ImageWriter and ReconstructionWriter
    caption/captions.jsonl                        of CaptionWriter
    STAGE/metrics.json or metrics.csv             of MetricsWriter or Lightning's CSVLogger
    timing.json                                   {stage: seconds}

Writes results.png (drawing, reconstruction, generated picture and prompt side by side), results.json and results.md, and prints
the table.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown

from nextflow.evaluation.captions import score_captions
from nextflow.evaluation.drawings import SPLITS, Drawing, load_drawings, read_picture
from nextflow.evaluation.pictures import Cell, draw_sheet
from nextflow.evaluation.retrieval import Proportion, retrieve

_SHOWN = {"train": 12, "compositional": 6, "validation": 4}
"""Rows of results.png for each split."""
_TOKENIZER_COLUMN = re.compile(r"(?:val|tokenizer)/(?P<column>psnr/\d+|ssim/\d+|psnr|ssim|usage)")
_LOSS_COLUMN = re.compile(r"(?P<split>train|val)/loss_(?:image/)?(?P<column>text|scale_\d+)")
_REPORTED = re.compile(r"(psnr|ssim|usage|perplexity|loss|accuracy)")


class _Picture(NamedTuple):
    """A generated or reconstructed picture and the drawing it stands for."""

    drawing: Drawing | None
    prompt: str
    split: str
    path: Path


def summarize(run: str | Path) -> dict[str, Any]:
    """Write results.png, results.json and results.md of a run; returns what results.json holds.

    Raises FileNotFoundError when the run has no data set.
    """
    run = Path(run)
    drawings = load_drawings(run / "data")
    generated = _pictures(run / "generate", drawings)
    reconstructed = _pictures(run / "reconstruct", drawings)
    results = {
        "drawings": {split: sum(drawing.split == split for drawing in drawings) for split in SPLITS},
        "retrieval": _retrieval(generated, drawings),
        "retrieval_of_reconstructions": _retrieval(_finest(reconstructed), drawings),
        "captions": _captions(run / "caption" / "captions.jsonl", drawings),
        "metrics": _metrics(run),
        "minutes": {stage: seconds / 60 for stage, seconds in _read_json(run / "timing.json").items()},
        "missing": [
            name
            for name, found in (
                ("generate/samples.jsonl", generated),
                ("reconstruct/samples.jsonl", reconstructed),
                ("caption/captions.jsonl", (run / "caption" / "captions.jsonl").is_file()),
                ("timing.json", (run / "timing.json").is_file()),
            )
            if not found
        ],
    }
    draw_results(generated, reconstructed).save(run / "results.png")
    (run / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (run / "results.md").write_text(_markdown(results), encoding="utf-8")
    return results


def draw_results(generated: Sequence[_Picture], reconstructed: Sequence[_Picture]) -> Image.Image:
    """Rows of drawing, reconstruction, generated picture and prompt: training captions, then compositional ones."""
    by_key = {
        (picture.drawing.split, picture.drawing.key): picture.path for picture in reconstructed if picture.drawing
    }
    rows = []
    for split, count in _SHOWN.items():
        for picture in [picture for picture in generated if picture.split == split][:count]:
            drawing = picture.drawing
            copy = by_key.get((drawing.split, drawing.key)) if drawing else None
            rows.append(
                [
                    Cell(drawing.pixels_HWC if drawing else None),
                    Cell(read_picture(copy) if copy else None, "" if copy else "-"),
                    Cell(read_picture(picture.path)),
                    Cell(None, f"{picture.prompt} ({split})"),
                ]
            )
    return draw_sheet(rows, header=("drawing", "reconstruction", "generated", "prompt"))


def _pictures(folder: Path, drawings: Sequence[Drawing]) -> list[_Picture]:
    """The pictures of samples.jsonl, each with its drawing: found by key, else by caption."""
    by_key = {(drawing.split, drawing.key): drawing for drawing in drawings}
    by_any_key = {drawing.key: drawing for drawing in drawings}
    by_caption = {drawing.caption: drawing for drawing in drawings}
    pictures = []
    for record in _read_lines(folder / "samples.jsonl"):
        key, prompt = record.get("key", ""), record.get("prompt", "")
        drawing = by_key.get((record.get("split", ""), key)) or by_any_key.get(key) or by_caption.get(prompt)
        split = drawing.split if drawing else record.get("split", "")
        pictures.append(_Picture(drawing, prompt, split, folder / record["file"]))
    return pictures


def _retrieval(pictures: Sequence[_Picture], drawings: Sequence[Drawing]) -> dict[str, Any]:
    known = [picture for picture in pictures if picture.drawing is not None]
    if not known:
        return {}
    places: dict[str, list[int]] = {}
    for place, drawing in enumerate(drawings):
        places.setdefault(drawing.caption, []).append(place)
    shape = drawings[0].pixels_HWC.shape
    found = retrieve(
        [_resized(read_picture(picture.path), shape) for picture in known],
        # Drawings with one caption are equally right: nothing in the prompt tells them apart.
        [places[picture.drawing.caption] for picture in known],  # type: ignore[union-attr]  # known ones have a drawing
        [picture.split for picture in known],
        [_resized(drawing.pixels_HWC, shape) for drawing in drawings],
    )
    return {
        split: {
            "rank_1": _plain(figures.rank_1),
            "rank_5": _plain(figures.rank_5),
            "median_rank": figures.median_rank,
            "gallery": len(drawings),
        }
        for split, figures in found.splits.items()
    }


def _finest(pictures: Sequence[_Picture]) -> list[_Picture]:
    """The last picture of each drawing: levels are written in growing order."""
    return list({(p.split, p.drawing.key): p for p in pictures if p.drawing is not None}.values())


def _captions(path: Path, drawings: Sequence[Drawing]) -> dict[str, Any]:
    splits = {drawing.key: drawing.split for drawing in drawings}
    groups: dict[str, list[dict]] = {}
    for record in _read_lines(path):
        if record["reference"]:
            groups.setdefault(splits.get(record["key"], record.get("split", "")), []).append(record)
    scores = {
        split: score_captions([r["caption"] for r in records], [r["reference"] for r in records])
        for split, records in groups.items()
    }
    return {split: {"exact": _plain(score.exact), "token_f1": score.token_f1} for split, score in scores.items()}


def _metrics(run: Path) -> dict[str, dict[str, float]]:
    """The last value of each reported metric, per stage (a folder of the run)."""
    stages = {}
    for folder in sorted(path for path in run.iterdir() if path.is_dir() and not path.name.endswith(".previous")):
        values: dict[str, float] = {}
        for path in sorted(folder.rglob("metrics.csv")):
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    values.update({name: float(value) for name, value in row.items() if value})
        values.update(_read_json(folder / "metrics.json"))
        chosen = {name: value for name, value in sorted(values.items()) if _REPORTED.search(name)}
        if chosen:
            stages[folder.name] = chosen
    return stages


def _markdown(results: dict[str, Any]) -> str:
    lines = ["# Results", "", f"Drawings: {', '.join(f'{n} {s}' for s, n in results['drawings'].items())}.", ""]
    rows: list[tuple[str, ...]]
    retrieval = results["retrieval"] or results["retrieval_of_reconstructions"]
    if retrieval:
        rows = [
            (split, _interval(found["rank_1"]), _interval(found["rank_5"]), f"{found['median_rank']:g}")
            for split, found in _ordered(results["retrieval"])
        ]
        gallery = next(iter(retrieval.values()))["gallery"]
        lines += [f"## Retrieval among {gallery} drawings, by pixel distance (95 % interval)", ""]
        rows += [
            (
                f"reconstructions, {split}",
                _interval(found["rank_1"]),
                _interval(found["rank_5"]),
                f"{found['median_rank']:g}",
            )
            for split, found in _ordered(results["retrieval_of_reconstructions"])
        ]
        lines += _table(("captions of", "rank 1", "rank 5", "median rank"), rows)
    if results["captions"]:
        rows = [
            (split, _interval(found["exact"]), f"{found['token_f1']:.3f}")
            for split, found in _ordered(results["captions"])
        ]
        lines += ["## Captions of drawings", "", *_table(("drawings of", "exact match", "token F1"), rows)]
    lines += _metrics_table("Tokenizer, on drawings it was not trained on", results["metrics"], _TOKENIZER_COLUMN)
    lines += _metrics_table("Transformer, loss by scale (train: last logged batch)", results["metrics"], _LOSS_COLUMN)
    if results["minutes"]:
        minutes = results["minutes"]
        rows = [(stage, f"{value:.1f}") for stage, value in [*minutes.items(), ("sum", sum(minutes.values()))]]
        lines += ["## Minutes", "", *_table(("stage", "minutes"), rows)]
    if results["missing"]:
        lines += [f"Not there when this was written: {', '.join(results['missing'])}.", ""]
    return "\n".join(lines)


def _metrics_table(title: str, metrics: dict[str, dict[str, float]], column: re.Pattern[str]) -> list[str]:
    """One row per stage (and split, where the names have one), one column per metric whose name matches."""
    cells: dict[str, dict[str, float]] = {}
    for stage, values in metrics.items():
        for name, value in values.items():
            match = column.fullmatch(name)
            if match:
                row = " ".join(part for part in (stage, match.groupdict().get("split")) if part)
                cells.setdefault(row, {})[match["column"]] = value
    if not cells:
        return []
    columns = sorted(
        {name for row in cells.values() for name in row}, key=lambda name: (name.startswith("scale"), name)
    )
    rows = [
        (row, *(f"{values[name]:.4g}" if name in values else "-" for name in columns)) for row, values in cells.items()
    ]
    return [f"## {title}", "", *_table(("stage", *columns), rows)]


def _ordered(splits: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(splits.items(), key=lambda item: SPLITS.index(item[0]) if item[0] in SPLITS else len(SPLITS))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    return [*body, ""]


def _plain(proportion: Proportion) -> dict[str, float]:
    return {"value": proportion.value, **proportion._asdict()}


def _interval(plain: dict[str, float]) -> str:
    return str(Proportion(int(plain["hits"]), int(plain["trials"]), plain["low"], plain["high"]))


def _resized(pixels_HWC: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if pixels_HWC.shape == shape:
        return pixels_HWC
    return np.asarray(Image.fromarray(pixels_HWC).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _read_json(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _read_lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Picture and table of a run's results.")
    parser.add_argument("--run", required=True, help="folder of the run, such as runs/quickstart")
    options = parser.parse_args()
    results = summarize(options.run)
    Console().print(Markdown(_markdown(results)))
    Console().print(f"Written to {options.run}: results.png, results.md, results.json")


if __name__ == "__main__":
    main()
