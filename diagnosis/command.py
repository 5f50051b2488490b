"""`python main.py doctor RUN ...`: what looks wrong with a training run, in words, from what it left in its folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nextflow.diagnosis.examination import Examination, examine
from nextflow.diagnosis.finding import SEVERITIES, Finding, Missing
from nextflow.diagnosis.reference import Reference, compare, home_of, read, record, reference_of, widen, write
from nextflow.diagnosis.run import TrainingRun, find_runs, read_run

ROOT = Path(__file__).resolve().parents[1]

DESCRIPTION = """What looks wrong with a training run, in words. Reads what the run left in its folder (event files of
TensorBoard, config.yaml, metrics.json); nothing is built, and a run may still be going on. With a reference beside the
recipe (configs/RECIPE/reference/STAGE.yaml for runs/RECIPE/STAGE) its figures are compared with what a good run had. The
exit status is 1 when there is a fault. docs/doctor.md lists what is checked."""


def main(arguments: Sequence[str]) -> None:
    """Read, check and print; ends the process with status 1 when there is a fault.

    Raises FileNotFoundError and ValueError saying what to change.
    """
    options = _parser().parse_args(arguments)
    if options.reference is not None and len(options.runs) > 1:
        raise ValueError("--reference belongs to one run: give one folder")
    found = [(run, folder) for argument in options.runs for folder in find_runs(argument) if (run := read_run(folder))]
    if not found:
        raise FileNotFoundError(f"{options.runs[0]}: its event files hold no training, only what was measured later")
    reports = [_report(run, options) for run, _ in found]
    if options.json:
        print(json.dumps([_plain(*report) for report in reports], indent=1))
    else:
        _print(reports)
    if any(finding.severity == "fault" for _, examination, _ in reports for finding in examination.findings):
        sys.exit(1)


Report = tuple[TrainingRun, Examination, Reference | None]


def _report(run: TrainingRun, options: argparse.Namespace) -> Report:
    path = options.reference or reference_of(run, ROOT)
    if options.record or options.widen:
        if path is None:
            raise ValueError(
                f"{run.folder} is no runs/RECIPE/STAGE of a recipe in configs/: say where with --reference FILE"
            )
        made = widen(read(path), run) if options.widen else record(run)
        # As it is given in the root: the folder may be a copy of what the config names.
        place = [] if options.reference is None else ["--reference", str(path)]
        write(made, path, " ".join(["python main.py doctor", home_of(run) or str(run.folder), "--record", *place]))
        print(f"wrote {path}")
    reference = read(path) if path is not None and (path.exists() or options.reference) else None
    examination = examine(run)
    if reference is not None:
        said = list(compare(run, reference))
        findings = [*examination.findings, *(one for one in said if isinstance(one, Finding))]
        findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
        missing = (*examination.missing, *(one for one in said if isinstance(one, Missing)))
        examination = Examination(tuple(findings), missing)
    return run, examination, reference


def _print(reports: Sequence[Report]) -> None:
    from rich.console import Console

    from nextflow.diagnosis.tables import show

    console = Console(highlight=False)
    for run, examination, reference in reports:
        show(run, examination, reference, console)
        console.print()
    if len(reports) > 1:
        for run, examination, _ in reports:
            counts = [sum(one.severity == severity for one in examination.findings) for severity in SEVERITIES]
            said = [f"{count} {severity}{'s' * (count > 1)}" for count, severity in zip(counts, SEVERITIES) if count]
            console.print(f"{run.folder}: {', '.join(said) or 'nothing found'}")


def _plain(run: TrainingRun, examination: Examination, reference: Reference | None) -> dict[str, object]:
    return {
        "run": str(run.folder),
        "kind": run.kind,
        "steps": run.steps,
        "planned_steps": run.planned,
        "compared": reference is not None,
        "findings": [{**asdict(finding), "sentence": finding.sentence} for finding in examination.findings],
        "missing": [asdict(missing) for missing in examination.missing],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="main.py doctor", description=DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, or one with runs in it")
    parser.add_argument(
        "--reference", metavar="FILE", type=Path, help="the file to compare with, instead of the recipe's own"
    )
    parser.add_argument("--record", action="store_true", help="first write the reference anew from this run")
    parser.add_argument("--widen", action="store_true", help="first take this run into the reference's ranges")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser
