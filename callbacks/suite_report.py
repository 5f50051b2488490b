"""Report of `test` on a suite of tasks: one table, JSON, and a sheet of answers with right and wrong marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.markdown import Markdown

from nextflow.callbacks.writers import save_png, write_lines
from nextflow.evaluation.pictures import Cell, draw_sheet
from nextflow.evaluation.suite import Answered, Judged, Score, Verdict, text_of
from nextflow.evaluation.suite_table import SCORES, markdown, plain


class SuiteReport(L.Callback):
    """Prints the table at the end of `test` and writes into OUTPUT/NAME.

        table.md            a row per category and split (`docs/evaluation.md`)
        scores.json         the same with all digits, and by detail (the attribute of an edit, the kind of a question)
        answers.jsonl       a line per prompt: what was asked, what was said, the verdicts
        contact_sheet.png   the first answers of each category, with right and wrong marked

    NAME is that of the checkpoint's folder (runs/openmoji/sft/last.ckpt: sft), or of what answers in its place (truth).
    Needs a module with `judged`, `scores`, `details` and `answers` of `lightning_modules.evaluating.EvaluationModule`.
    """

    def __init__(self, output: str, columns: int = 12, rows: int = 1) -> None:
        """
        Args:
            output: folder to write to.
            columns: pictures in a row of the sheet.
            rows: rows of each category and split.
        """
        self.output, self.columns, self.rows = Path(output), columns, rows

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write everything, on one rank."""
        if not trainer.is_global_zero:
            return
        judged, scores = pl_module.judged, pl_module.scores
        checkpoint = str(trainer.ckpt_path or "")
        name = Path(checkpoint).parent.name if pl_module.answers == "model" else pl_module.answers
        folder = self.output / name
        folder.mkdir(parents=True, exist_ok=True)
        table = markdown(scores)
        (folder / "table.md").write_text(table, encoding="utf-8")
        write_lines(folder / "answers.jsonl", [_line(one) for one in judged])
        save_png(self._sheet(judged, scores), folder / "contact_sheet.png")
        numbers = {
            "checkpoint": checkpoint,
            "answers": pl_module.answers,
            "scores": [plain(score) for score in scores],
            "details": [plain(score) for score in pl_module.details],
        }
        (folder / SCORES).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        console = Console()
        console.print(Markdown(table))
        console.print(f"Written to {folder}: table.md, scores.json, answers.jsonl, contact_sheet.png")

    def _sheet(self, judged: Sequence[Judged], scores: Sequence[Score]) -> Any:
        rows: list[list[Cell]] = []
        shown: list[list[int]] = []
        for score in scores:
            answers = [
                (one, verdict.right) for one, verdicts in judged for verdict in verdicts if _counts(one, verdict, score)
            ]
            if (same := [id(one) for one, _ in answers]) in shown:
                continue  # these answers are shown already, marked by the category that says most
            shown.append(same)
            row = [Cell(None, f"{score.category} ({score.split}): {score.right.hits} of {score.right.trials}")]
            of_score = [row]
            for one, is_right in answers:
                cells = _cells(one, is_right)
                if len(of_score[-1]) + len(cells) > self.columns + 1:
                    of_score.append([Cell(None)])
                of_score[-1] += cells
            rows += of_score[: self.rows]
        return draw_sheet(rows, side=96, caption_lines=4)


def _counts(answered: Answered, verdict: Verdict, score: Score) -> bool:
    return (verdict.category, answered.split) == (score.category, score.split)


def _cells(answered: Answered, is_right: bool) -> list[Cell]:
    """Prompt and answer: a text stands under the picture behind it, the last one under the picture in front of it."""
    cells: list[Cell] = []
    said: list[str] = []
    for part in (*answered.given, *answered.answer):
        if isinstance(part, str):
            said.append(part.strip())
        else:
            cells.append(Cell(part, " ".join(said)))
            said = []
    if not cells:
        return []
    if said and not is_right:
        said.append(f"(right: {text_of(answered.known)})")
    last = cells[-1]
    return [*cells[:-1], Cell(last.pixels_HWC, " / ".join(filter(None, (last.caption, *said))), is_right)]


def _line(judged: Judged) -> dict[str, Any]:
    answered, verdicts = judged
    return {
        **{name: getattr(answered, name) for name in ("kind", "index", "key", "split")},
        "prompt": text_of(answered.given),
        "known": text_of(answered.known),
        "answer": answered.text,
        "pictures": len(answered.pictures),
        "right": {verdict.category: verdict.right for verdict in verdicts},
    }
