"""quickstart.py's driver on stages that take no time: what is skipped, resumed, run again and reported."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nextflow import quickstart
from nextflow.quickstart import STAGES, Stage, StageError, run_stages

FAKE = '''
"""A stage: appends to its folder what it did; `fail: true` and `hang: true` in the config make it stop."""
import json, signal, sys, time, pathlib
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as Lightning does, whose exit code says nothing
arguments = sys.argv[1:]
config = json.loads(pathlib.Path(arguments[arguments.index("--config") + 1]).read_text())
folder = pathlib.Path(config["folder"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "log.txt", "a") as log:
    log.write(" ".join(arguments[2:]) + "\\n")
if config.get("hang"):
    (folder / "last.ckpt").write_text("half way")
    while not (folder / "go").exists():
        time.sleep(0.01)
sys.exit(3 if config.get("fail") else 0)
'''


class Lab:
    """A run folder, a config folder and two stages, b needing a."""

    def __init__(self, folder: Path) -> None:
        self.run, self.configs = folder / "run", folder / "configs"
        self.configs.mkdir()
        for name in ("a", "b"):
            self.write(name)

    stages = (
        Stage(name="a", title="first", kind="module", module="nextflow_fake_stage", config="1_a.yaml", minutes=1),
        Stage(
            name="b",
            title="second",
            kind="module",
            module="nextflow_fake_stage",
            config="2_b.yaml",
            minutes=1,
            needs=("a",),
        ),
    )

    def write(self, name: str, comment: str = "", **settings: object) -> None:
        number = "12"["ab".index(name)]
        # DEFAULT_RUN in a config stands for the run folder, wherever that is.
        content = json.dumps({"folder": f"{quickstart.DEFAULT_RUN}/{name}", **settings})
        (self.configs / f"{number}_{name}.yaml").write_text(content + comment)

    def log(self, name: str) -> list[str]:
        path = self.run / name / "log.txt"
        return path.read_text().splitlines() if path.exists() else []

    def go(self, **options: object) -> None:
        run_stages(self.stages, config_dir=self.configs, run=self.run, **options)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    (tmp_path / "nextflow_fake_stage.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Lab(tmp_path)


def test_finished_stages_are_skipped(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.go()
    first = capsys.readouterr().out
    assert "1/2 a: first (about 1 min)" in first and "command:" in first and f"{lab.run}/b/" in first
    lab.go()
    assert capsys.readouterr().out.count("done already") == 2
    assert len(lab.log("a")) == len(lab.log("b")) == 1


def test_changed_config_runs_again_with_all_that_needs_it(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.go()
    lab.write("a", rate=2)
    lab.go()
    output = capsys.readouterr().out
    assert "its config changed" in output and "stage a ran again" in output
    assert len(lab.log("b")) == 1 and len((lab.run / "b.previous" / "log.txt").read_text().splitlines()) == 1


def test_change_downstream_leaves_upstream_alone(lab: Lab) -> None:
    lab.go()
    before = (lab.run / "a" / "done.json").read_text()
    lab.write("b", rate=2)
    lab.go()
    assert (lab.run / "a" / "done.json").read_text() == before
    assert (lab.run / "b.previous").is_dir()


def test_changed_comment_runs_nothing(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.go()
    lab.write("a", comment="\n# expected time: 2 minutes\n")
    capsys.readouterr()
    lab.go()
    assert capsys.readouterr().out.count("done already") == 2


def test_deleted_result_runs_again(lab: Lab) -> None:
    lab.go()
    (lab.run / "a" / "done.json").unlink()
    lab.go()
    assert (lab.run / "a" / "done.json").exists() and (lab.run / "b.previous").exists()


def test_failure_names_stage_and_command(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.write("b", fail=True)
    with pytest.raises(StageError, match=r"stage 2/2 b ended with exit code 3(.|\n)*-m nextflow_fake_stage --config"):
        lab.go()
    arguments = ["--config-dir", str(lab.configs), "--run", str(lab.run)]
    assert quickstart.main(arguments, lab.stages) == 1
    assert "error: stage 2/2 b" in capsys.readouterr().err
    lab.write("b")
    assert quickstart.main(arguments, lab.stages) == 0
    assert len(lab.log("a")) == 1


def test_only_runs_one_stage_by_number_or_name(lab: Lab) -> None:
    with pytest.raises(StageError, match="needs the result of stage a"):
        lab.go(only="2")
    lab.go(only="a")
    assert not lab.log("b")
    lab.go(only="2")
    assert lab.log("b")
    with pytest.raises(StageError, match="choose 1 to 2 or one of a, b"):
        lab.go(only="9")


def test_force_runs_again(lab: Lab) -> None:
    lab.go()
    lab.go(only="a", force=True)
    assert (lab.run / "a.previous").is_dir() and len(lab.log("a")) == 1


def test_folders_may_be_relative_to_where_it_is_called(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert quickstart.main(["--config-dir", "configs", "--run", "run"], lab.stages) == 0
    assert lab.log("a") and lab.log("b")


def test_missing_config_is_named(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    (lab.configs / "2_b.yaml").unlink()
    assert quickstart.main(["--config-dir", str(lab.configs), "--run", str(lab.run)], lab.stages) == 1
    assert "2_b.yaml" in capsys.readouterr().err


def test_timing_is_written(lab: Lab) -> None:
    lab.go()
    timing = json.loads((lab.run / "timing.json").read_text())
    assert set(timing) == {"a", "b"} and all(seconds > 0 for seconds in timing.values())


DRIVER = """
import signal, sys
from nextflow import quickstart
from nextflow.quickstart import Stage
# A `fit` stage whose command is the fake one: main.py is not needed to see what the driver passes.
quickstart._Pipeline._command = lambda self, stage, arguments: [
    sys.executable, "-m", "nextflow_fake_stage", "--config", str(self.config_dir / stage.config)]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background of a shell ignores it
stages = (Stage(name="a", title="first", kind="fit", config="1_a.yaml", minutes=1),)
sys.exit(quickstart.main(sys.argv[1:], stages))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_training_goes_on_from_its_checkpoint(lab: Lab, tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), "--config-dir", str(lab.configs), "--run", str(lab.run)]
    lab.write("a", hang=True)
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (lab.run / "a" / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    if how == signal.SIGTERM:
        process.terminate()  # to the driver alone, which passes it on
    else:
        os.killpg(process.pid, how)  # as a terminal's Ctrl-C, or a machine that goes away
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 1, signal.SIGKILL: -signal.SIGKILL}[how]
    assert not (lab.run / "a" / "done.json").exists()
    if how == signal.SIGINT:
        assert "start the quickstart again" in errors

    (lab.run / "a" / "go").touch()
    seconds = json.loads((lab.run / "timing.json").read_text())["a"] if how != signal.SIGKILL else 0.0
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "goes on from its last checkpoint" in result.stdout
    assert lab.log("a") == ["", f"--ckpt_path {lab.run}/a/last.ckpt"]
    assert json.loads((lab.run / "timing.json").read_text())["a"] > seconds


def test_the_table_is_in_order() -> None:
    """Each stage needs earlier ones only, and the configs are numbered in the order they run."""
    for index, stage in enumerate(STAGES):
        assert set(stage.needs) <= {earlier.name for earlier in STAGES[:index]}
        assert stage.config is None or stage.config == f"{index + 1}_{stage.name}.yaml"
        assert (stage.kind == "module") == bool(stage.module)
