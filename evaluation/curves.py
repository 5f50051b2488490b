"""Curves of several runs in one picture, read from their TensorBoard files.

    python -m nextflow.evaluation.curves --runs runs/openmoji/tokenizer_pixel runs/openmoji/tokenizer_joint \
        --tags val/psnr/32 val/psnr/64 --output curves.png

Runs stand behind each other on the horizontal axis, as the stages of one training do; `--overlay` lets all start at 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Points = list[tuple[int, float]]
"""(step, value), in the order of steps."""


class Run(NamedTuple):
    """What a run's folder says of the tags asked for."""

    name: str
    last_step: int
    curves: dict[str, Points]


def read_run(folder: str | Path, tags: Sequence[str]) -> Run:
    """Scalars of all event files of a folder; of a step logged twice (a resumed run) the later value counts.

    Raises FileNotFoundError for a folder without event files, ValueError for a tag that none of them holds.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(Path(folder).glob("events.out.tfevents.*")):
        raise FileNotFoundError(f"{folder} holds no TensorBoard file (events.out.tfevents.*)")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    missing = [tag for tag in tags if tag not in known]
    if len(missing) == len(tags):
        raise ValueError(f"{folder} has none of {missing}; it has {', '.join(sorted(known))}")
    curves = {
        tag: sorted({event.step: event.value for event in events.Scalars(tag)}.items()) for tag in tags if tag in known
    }
    return Run(Path(folder).name, max(points[-1][0] for points in curves.values()), curves)


def draw_curves(runs: Sequence[Run], output: str | Path, *, overlay: bool = False, label: str = "") -> None:
    """Draw all curves into a PNG: a colour for each tag, a dashed line and a name where a run begins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    tags = list(dict.fromkeys(tag for run in runs for tag in run.curves))
    start = 0
    for number, run in enumerate(runs):
        if not overlay:
            axes.axvline(start, color="0.7", linestyle="--", linewidth=0.8)
            axes.text(start, 1.01, f" {run.name}", transform=axes.get_xaxis_transform(), fontsize=8)
        for tag, points in run.curves.items():
            steps, values = zip(*points)
            colour = number * len(tags) + tags.index(tag) if overlay else tags.index(tag)
            named = f"{run.name}: {tag}" if overlay else tag if number == 0 or tag not in runs[0].curves else None
            axes.plot([start + step for step in steps], values, color=f"C{colour % 10}", label=named, linewidth=1.5)
        start += 0 if overlay else run.last_step
    axes.set_xlabel("batches")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m nextflow.evaluation.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", nargs="+", required=True, help="folders of TensorBoardLogger, in order")
    parser.add_argument("--tags", nargs="+", required=True, help="scalars to draw")
    parser.add_argument("--output", required=True, help="the PNG to write")
    parser.add_argument("--overlay", action="store_true", help="let all runs start at 0")
    parser.add_argument("--label", default="", help="words at the vertical axis")
    arguments = parser.parse_args()
    try:
        runs = [read_run(folder, arguments.tags) for folder in arguments.runs]
    except (FileNotFoundError, ValueError) as error:  # the user's to mend, in one line
        raise SystemExit(f"error: {error}") from error
    draw_curves(runs, arguments.output, overlay=arguments.overlay, label=arguments.label)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
