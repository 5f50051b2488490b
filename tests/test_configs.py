"""Every YAML under configs/ is accepted by the command line as a whole; each quickstart stage also runs, for two steps."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nextflow.main import cli, main
from nextflow.quickstart import DEFAULT_RUN, STAGES, Stage

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "reference"
"""Folders of what `doctor` expects: no configs."""
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != REFERENCE)
STAGE_OF = {stage.config: stage for stage in STAGES if stage.config is not None}


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns where arguments are passed while pytest's own stand in sys.argv."""
    monkeypatch.setattr("sys.argv", ["main.py"])


def command_of(path: Path) -> list[str]:
    """The words of the command in the lab note, `#   python main.py fit -c ...`: a comment that can be tried out.

    A config that is joined to others names them in its command; a part without a command of its own has none.
    """
    lines = [line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#   python ")]
    return lines[0].split()[1:] if lines else []


def is_run(path: Path) -> bool:
    """Whether the command line reads it, and not a parser of its own (`python -m MODULE`)."""
    return command_of(path)[:1] == ["main.py"]


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT / "configs")) for path in paths]


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_config_opens_with_its_lab_note(path: Path) -> None:
    """First line: a comment that says what it is."""
    assert path.read_text().startswith("#")
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_lab_note_has_the_command_that_reads_the_config(path: Path) -> None:
    assert str(path.relative_to(ROOT)) in command_of(path)


RUNS = [path for path in CONFIGS if is_run(path)]


@pytest.mark.parametrize("path", RUNS, ids=names(RUNS))
def test_config_is_accepted_by_the_command_line(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of the lab note, but for printing its config instead of running."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main([*command_of(path)[1:], "--print_config"])
    output = capsys.readouterr()
    assert stop.value.code == 0, output.err
    printed = yaml.safe_load(output.out)
    # Nothing was dropped: what the file says is what the run gets.
    written = yaml.safe_load(path.read_text())
    for part in ("model", "data"):
        if "class_path" in written.get(part, {}):
            assert printed[part]["class_path"] == written[part]["class_path"]


FEWEST = {
    "fit": ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"],
    "validate": ["--trainer.limit_val_batches=1"],
    "test": ["--trainer.limit_test_batches=1"],
    "predict": ["--trainer.limit_predict_batches=1"],
    "module": [],
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the configs' relative paths lead: every stage finds there what the stages before it left."""
    return tmp_path_factory.mktemp("quickstart")


@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
def test_quickstart_config_runs(stage: Stage, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage as `make quickstart` runs it, but on few drawings, for two steps or one batch."""
    monkeypatch.chdir(run_folder)
    arguments = [argument.replace("RUN", DEFAULT_RUN) for argument in stage.arguments[0]]
    config = "" if stage.config is None else str(ROOT / "configs" / "quickstart" / stage.config)
    if stage.kind == "module":
        arguments += ["--config", config] if config else []
        arguments += ["--max_drawings=80", "--num_workers=0"] if stage.name == "data" else []
        subprocess.run([sys.executable, "-m", stage.module, *arguments], check=True)
        return
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    # Later stages read the codes of every split and level; one batch of the drawings would be of one.
    fewest = [] if stage.name == "codes" else FEWEST[stage.kind]
    # Two steps are of the first level alone, and another one would be refused.
    fewest = [*fewest, "--data.level=32"] if stage.name == "generate" else fewest
    built = cli([stage.kind, "-c", config, *arguments, *fewest, *quiet])
    if stage.kind == "fit":
        assert built.trainer.global_step >= 1
        built.trainer.save_checkpoint(Path(DEFAULT_RUN) / stage.name / "last.ckpt")


def test_quickstart_stages_and_configs_match() -> None:
    files = {path.name for path in (ROOT / "configs" / "quickstart").glob("*.yaml")}
    assert set(STAGE_OF) <= files
    assert {name for name in files if name[0].isdigit()} == set(STAGE_OF)


def test_quickstart_modules_have_a_command_line() -> None:
    """`python -m MODULE` only works where the module, or the __main__ of a folder, ends with a __main__ block."""
    for stage in STAGES:
        if stage.kind == "module":
            path = ROOT.joinpath(*stage.module.split(".")[1:])
            path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            tests = [ast.unparse(node.test) for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
            assert "__name__ == '__main__'" in tests, f"{stage.module} cannot be run"
