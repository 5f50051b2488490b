"""Draws the pictures of docs/generation.md with an exported OpenMoji model: the first documents of each split, not chosen ones.

    python main.py export -c configs/openmoji/transformer.yaml --ckpt_path runs/openmoji/sft/last.ckpt --output hub
    python docs/pictures.py --pipeline hub --documents runs/openmoji/data_all --output docs/images

Also an example of how the pipeline is asked for each task.
"""

from __future__ import annotations

import argparse
import io
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from nextflow.evaluation.pictures import Cell, draw_sheet
from nextflow.generation.pipeline import NextFlowPipeline
from nextflow.generation.sampling import SamplingConfig
from nextflow.sequence.shards import open_shard

Parts = list[str | Image.Image]
GREEDY = SamplingConfig(greedy=True)
VARIED = SamplingConfig(top_k=20, top_p=0.9)
GUIDANCE = 1.0


def main() -> None:
    """Draw every sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="folder that `python main.py export` wrote")
    parser.add_argument("--documents", required=True, help="folder of `python -m nextflow.datamodules.openmoji`")
    parser.add_argument("--output", required=True, help="folder for the PNG files")
    given = parser.parse_args()
    pipeline, documents, output = (
        NextFlowPipeline.from_pretrained(given.pipeline),
        Path(given.documents),
        Path(given.output),
    )
    output.mkdir(parents=True, exist_ok=True)
    sheets = {
        "preview": preview(pipeline, documents),
        "scenes": scenes(pipeline, documents),
        "ratios": ratios(pipeline),
        "inpainting": inpainting(pipeline, documents),
        "editing": editing(pipeline, documents),
        "stories": stories(pipeline, documents),
        "examples": in_context(pipeline, documents),
        "reasoning": reasoning(pipeline, documents),
        "questions": questions(pipeline, documents),
    }
    for name, rows in sheets.items():
        sheet = draw_sheet(rows, side=96, caption_lines=4)
        sheet.quantize(192).save(output / f"generation_{name}.png", optimize=True)


def preview(pipeline: NextFlowPipeline, documents: Path) -> list[list[Cell]]:
    """Scenes and drawings after each of their scales."""
    captions = [parts[0] for folder in ("scenes/train", "train") for parts in read(documents / folder, 2)]
    rows: list[list[Cell]] = [[] for _ in captions]
    requests = [pipeline.request(caption, guidance=GUIDANCE) for caption in captions]
    for answer in pipeline.stream(requests, sampling=GREEDY):
        place = answer.result.index
        if answer.image is not None and len(rows[place]) < len(pipeline.schedule.grids(64)):
            rows[place].append(cell(answer.image, "" if rows[place] else str(captions[place])))
    return rows


def scenes(pipeline: NextFlowPipeline, documents: Path) -> list[list[Cell]]:
    """Combinations that training never had: truth, then four samples."""
    rows = []
    for caption, truth in read(documents / "scenes/compositional", 6):
        requests = [pipeline.request(caption, guidance=GUIDANCE, seed=seed) for seed in range(4)]
        samples = [cell(answer.image) for answer in pipeline.generate(requests, sampling=VARIED)]
        rows.append([cell(truth, str(caption)), *samples])
    return [first + second for first, second in zip(rows[::2], rows[1::2])]


def ratios(pipeline: NextFlowPipeline) -> list[list[Cell]]:
    """One caption in ratios of height to width, one batch."""
    caption, heights = "a red heart to the left of a fox", (0.4, 0.6, 1.0, 1.6, 2.5)
    requests = [pipeline.request(caption, guidance=GUIDANCE, aspect_ratio=ratio) for ratio in heights]
    answers = pipeline.generate(requests, sampling=GREEDY)
    return [[cell(answer.image, f"{ratio}: {caption}") for answer, ratio in zip(answers, heights)]]


def inpainting(pipeline: NextFlowPipeline, documents: Path) -> list[list[Cell]]:
    """Right half drawn anew; then other details for the same first five scales."""
    rows = []
    for caption, picture in read(documents / "scenes/train", 4):
        assert isinstance(picture, Image.Image)
        mask = Image.new("L", picture.size, 0)
        ImageDraw.Draw(mask).rectangle((picture.width // 2, 0, picture.width, picture.height), fill=255)
        kept = [pipeline.outside(picture, mask)] * 3 + [pipeline.coarse(picture, 5)] * 3
        ratio = picture.height / picture.width
        requests = [
            pipeline.request(caption, given=given, seed=seed, aspect_ratio=ratio) for seed, given in enumerate(kept)
        ]
        answers = pipeline.generate(requests, sampling=VARIED)
        hidden = Image.composite(Image.new("RGB", picture.size, "grey"), picture, mask)
        rows.append([cell(picture, str(caption)), cell(hidden), *(cell(answer.image) for answer in answers)])
    return rows


def editing(pipeline: NextFlowPipeline, documents: Path) -> list[list[Cell]]:
    """Source, answer, truth: four of training, four whose drawing and attribute never met."""
    found = [parts for split in ("train", "compositional") for parts in read(documents / "edits" / split, 6)]
    answers = pipeline.generate([pipeline.request(parts[:-1], guidance=GUIDANCE) for parts in found], sampling=GREEDY)
    cells = [
        [cell(parts[0], str(parts[1])), cell(answer.image, "answer"), cell(parts[-1], "truth")]
        for parts, answer in zip(found, answers)
    ]
    return [list(chain.from_iterable(cells[start : start + 3])) for start in range(0, len(cells), 3)]


def stories(pipeline: NextFlowPipeline, documents: Path) -> list[list[Cell]]:
    """Told from their first sentence."""
    beginnings = [parts[0] for parts in read(documents / "stories/train", 6)]
    requests = [pipeline.request(first, task="interleaved", max_images=5) for first in beginnings]
    rows = []
    for first, answer in zip(beginnings, pipeline.generate(requests, sampling=GREEDY)):
        row, said = [], str(first)
        for part in answer.parts:
            if isinstance(part, str):
                said = part
            else:
                row.append(cell(part, said))
                said = ""
        rows.append(row)
    return rows


def in_context(pipeline: NextFlowPipeline, documents: Path) -> list[list[Cell]]:
    """Two examples of a change, the picture to change, the answer, the truth."""
    found = read(documents / "examples/train", 4)
    answers = pipeline.generate([pipeline.request(parts[:-1]) for parts in found], sampling=GREEDY)
    rows = []
    for parts, answer in zip(found, answers):
        shown = [part for part in parts if not isinstance(part, str)]
        names = ("", "", "", "", "to change")
        rows.append(
            [cell(part, name) for part, name in zip(shown, names)]
            + [cell(answer.image, "answer"), cell(shown[-1], "truth")]
        )
    return rows


def reasoning(pipeline: NextFlowPipeline, documents: Path) -> list[list[Cell]]:
    """A request, the words that the model writes first, and its picture."""
    found = [parts for split in ("train", "compositional") for parts in read(documents / "reasoning" / split, 3)]
    requests = [pipeline.request(parts[0], task="reasoning") for parts in found]
    row = []
    for parts, answer in zip(found, pipeline.generate(requests, sampling=GREEDY)):
        row += [cell(answer.image, f"{parts[0]}"), Cell(None, answer.text.strip())]
    return [row[:6], row[6:]]


def questions(pipeline: NextFlowPipeline, documents: Path) -> list[list[Cell]]:
    """Pictures with questions, and what the model answers."""
    found = [parts for split in ("train", "compositional") for parts in read(documents / "questions" / split, 8)]
    requests = [pipeline.request(parts[:-1], task="text") for parts in found]
    row = [
        cell(parts[0], f"{parts[1]} {answer.text.strip()} (truth: {str(parts[2]).strip()})")
        for parts, answer in zip(found, pipeline.generate(requests, sampling=GREEDY))
    ]
    return [row[:8], row[8:]]


def read(folder: Path, count: int) -> list[Parts]:
    """Texts and pictures of the first documents of a folder, but for those with a gesture that a page does without."""
    shard = open_shard(sorted(folder.glob("*.tar"))[0])
    keys = [key for key in shard.keys if "1F595" not in str(shard.record(key)["metadata"])]
    return [
        [
            segment["text"]
            if "text" in segment
            else Image.open(io.BytesIO(shard.read(key, segment["image"]))).convert("RGB")
            for segment in shard.record(key)["segments"]
        ]
        for key in keys[:count]
    ]


def cell(picture: object, caption: str = "") -> Cell:
    """A picture with words below."""
    return Cell(np.asarray(picture), caption)


if __name__ == "__main__":
    main()
