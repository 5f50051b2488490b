"""A report on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from nextflow.diagnosis.examination import FIGURES, Examination
from nextflow.diagnosis.reference import Reference
from nextflow.diagnosis.run import TrainingRun

COLOURS = {"fault": "bold red", "warning": "bold yellow", "note": "bold blue"}


def show(run: TrainingRun, examination: Examination, reference: Reference | None, console: Console) -> None:
    """Print the figures, what was found and what could not be seen."""
    of = f" of {run.planned:,}" if run.planned else ""
    console.print(f"[bold]{run.folder}[/bold]: {run.kind}, {run.steps:,}{of} steps")
    console.print(_figures(run, reference))
    for finding in examination.findings:
        console.print(f"[{COLOURS[finding.severity]}]{finding.severity}[/], {finding.about}")
        console.print(Padding(finding.sentence, (0, 0, 0, 4)), markup=False)
    if not examination.findings:
        console.print("Nothing found.")
    if examination.missing:
        console.print("Not checked, as the run did not log it:")
        for how in dict.fromkeys(missing.how for missing in examination.missing):
            what = ", ".join(missing.what for missing in examination.missing if missing.how == how)
            console.print(Padding(f"{what}: needs {how}", (0, 0, 0, 4)), markup=False)


def _figures(run: TrainingRun, reference: Reference | None) -> Table:
    table = Table()
    table.add_column("metric", overflow="fold")  # a name that is cut off cannot be looked up in TensorBoard
    for title in ("first", "last", "best", "at step", *([] if reference is None else ["expected"])):
        table.add_column(title, justify="right")
    for figure in FIGURES[run.kind]:
        curve = run.curve(figure.name)
        if curve is None:
            continue
        cells = [_digits(float(curve.value_N[0])), _digits(curve.last), "", ""]
        if figure.better != "neither":
            best = int(curve.value_N.argmin() if figure.better == "lower" else curve.value_N.argmax())
            cells[2:] = [_digits(float(curve.value_N[best])), str(curve.step_N[best])]
        if reference is not None:
            due = {
                step: one for step, one in reference.metrics.get(figure.name, {}).items() if step <= curve.step_N[-1]
            }
            one = due[max(due)] if due else None
            cells.append("" if one is None else f"{_digits(one.low)} to {_digits(one.high)}")
        table.add_row(figure.name, *cells)
    return table


def _digits(value: float) -> str:
    return f"{value:.4g}"
