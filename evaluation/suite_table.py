"""The scores of a suite as tables: of one run, and of several side by side.

python -m nextflow.evaluation.suite_table runs/openmoji/evaluation/{truth,shuffled,sft}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from nextflow.evaluation.retrieval import Proportion
from nextflow.evaluation.suite import Score

SCORES = "scores.json"
"""In the folder of a run: {"checkpoint": ..., "answers": ..., "scores": [...], "details": [...]}."""


def markdown(scores: Sequence[Score]) -> str:
    """The table of one run; `docs/evaluation.md` explains its columns."""
    rows = [
        (
            score.category,
            score.split,
            *_cells(score.right),
            "" if score.measure is None else f"{score.measure.value:.2f} {score.measure.unit}",
        )
        for score in scores
    ]
    return _table(("category", "split", "right", "95 % interval", "of", "beside"), rows)


def side_by_side(folders: Sequence[str | Path]) -> str:
    """Shares of right answers of several runs, a column each.

    Raises FileNotFoundError for a folder without scores.
    """
    runs: dict[str, dict[tuple[str, str], str]] = {}
    for folder in map(Path, folders):
        if not (folder / SCORES).is_file():
            raise FileNotFoundError(f"no {folder / SCORES}: run `python main.py test` with SuiteReport first")
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))["scores"]
        name = str(folder) if folder.name in runs else folder.name
        runs[name] = {(score["category"], score["split"]): f"{score['value']:.2f}" for score in scores}
    names = list(dict.fromkeys(name for run in runs.values() for name in run))
    rows = [(*name, *(run.get(name, "-") for run in runs.values())) for name in names]
    return _table(("category", "split", *runs), rows)


def plain(score: Score) -> dict[str, Any]:
    """For JSON."""
    values = {"category": score.category, "split": score.split, "detail": score.detail, "value": score.right.value}
    values |= score.right._asdict()
    if score.measure is not None:
        values[score.measure.unit] = score.measure.value
    return values


def _cells(right: Proportion) -> tuple[str, str, str]:
    return f"{right.value:.3f}", f"{right.low:.3f} to {right.high:.3f}", str(right.trials)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Scores of several runs of a suite, side by side.")
    parser.add_argument("folders", nargs="+", help="folders that SuiteReport wrote")
    try:
        Console().print(Markdown(side_by_side(parser.parse_args().folders)))
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
