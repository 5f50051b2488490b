"""`python main.py doctor` on real trainings: a healthy one, and ones that are broken on purpose."""

import json
from pathlib import Path

import pytest

from nextflow.main import main


def examined(capsys, *arguments: str) -> tuple[dict, int]:
    """The report of one run, and the exit status."""
    capsys.readouterr()
    status = 0
    try:
        main(["doctor", "--json", *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    (report,) = json.loads(capsys.readouterr().out)
    return report, status


def about(report: dict, severity: str = "fault") -> set[str]:
    return {finding["about"] for finding in report["findings"] if finding["severity"] == severity}


def test_a_healthy_run(healthy: Path, capsys) -> None:
    report, status = examined(capsys, str(healthy))
    assert status == 0 and about(report) == about(report, "warning") == set()
    assert (report["kind"], report["steps"], report["planned_steps"], report["compared"]) == (
        "tokenizer",
        120,
        120,
        False,
    )


def test_what_is_printed(healthy: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    main(["doctor", str(healthy.parent)])  # the folder above it has runs in it: one
    shown = capsys.readouterr().out
    assert "tokenizer, 120 of 120 steps" in shown and "val/psnr" in shown and "Nothing found." in shown


def test_a_learning_rate_that_is_far_too_high(healthy: Path, train, capsys, tmp_path) -> None:
    reference = str(tmp_path / "reference.yaml")
    main(["doctor", str(healthy), "--record", "--reference", reference])
    assert examined(capsys, str(healthy), "--reference", reference)[0]["findings"] == []

    run = train("--model.generator_optimizer.init_args.lr=3.0")
    report, status = examined(capsys, str(run), "--reference", reference)
    assert status == 1 and report["compared"]
    # It explodes, and learns a little once the rate has decayed; where the rounding falls badly its codebook dies as well.
    assert {"learning", "reference"} <= about(report) <= {"learning", "reference", "dead codebook"}
    (settings,) = [finding for finding in report["findings"] if finding["about"] == "settings"]
    assert "model.generator_optimizer.lr is 3.0, not 0.004" in settings["sentence"]


def test_a_codebook_that_is_left_to_die(train, capsys) -> None:
    run = train("--model.tokenizer.revive_interval=0", "--model.tokenizer.codebook_size=512")
    report, status = examined(capsys, str(run))
    assert status == 0 and about(report, "warning") == {"dead codebook"}
    assert (
        "of 512 entries" in report["findings"][0]["sentence"]
        and "revive_interval to 10" in report["findings"][0]["advice"]
    )


def test_an_interrupted_run_that_goes_on(train, capsys, tmp_path) -> None:
    """What the second attempt did again counts once; while it is fresh, the run is taken to be under way."""
    short = ["--model.total_steps=120", "--trainer.max_steps"]
    run = train(*short, "60", folder=tmp_path)
    report, _ = examined(capsys, str(run))
    assert about(report, "warning") == {"learning rate"}  # its schedule is that of 120 steps
    train(*short, "120", "--ckpt_path", str(run / "last.ckpt"), folder=tmp_path)
    report, status = examined(capsys, str(run))
    assert status == 0 and report["steps"] == 120 and about(report, "warning") == set()
    assert len(list(run.glob("events*"))) == 2


def test_mistakes_end_with_one_line(healthy: Path, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit, match=r"error: .*there is no such folder"):
        main(["doctor", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"say where with --reference FILE"):
        main(["doctor", str(healthy), "--record"])
    with pytest.raises(SystemExit, match=r"--reference belongs to one run"):
        main(["doctor", str(healthy), str(healthy), "--reference", "a.yaml"])
