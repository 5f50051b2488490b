"""main.py: help, how configs compose, refusal of wrong keys, checkpoints; on the toy model and data below."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from nextflow.main import DATA, MODELS, MORE, NextFlowCLI, cli, main

TOY = '''
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from nextflow.sequence.scales import ScaleSchedule


@dataclass(kw_only=True)
class Config:
    width: int = 3
    """Number of inputs of the toy."""


class Model(LightningModule):
    def __init__(self, *, config: Config = Config(), rate: float = 0.1, level: int = 256, broken: bool = False):
        super().__init__()
        self.save_hyperparameters()
        self.rate = rate
        self.grids = ScaleSchedule.nextflow().grids(level)  # a ValueError of ours for an unknown level
        self.linear = torch.nn.Linear(config.width, int("broken") if broken else 1)

    def training_step(self, batch):
        return self.linear(batch).square().mean()

    def predict_step(self, batch):
        return self.linear(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Data(LightningDataModule):
    def __init__(self, *, batch_size: int = 2):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(torch.ones(4, 3), batch_size=self.batch_size)

    predict_dataloader = train_dataloader


class OtherData(Data):
    def __init__(self, *, batch_size: int = 1, shuffle: bool = False):
        super().__init__(batch_size=batch_size)
'''

CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: checkpoints, save_last: true, save_top_k: 0}
model:
  class_path: nextflow_toy.Model
data:
  class_path: nextflow_toy.Data
"""


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns where arguments are passed while pytest's own stand in sys.argv."""
    monkeypatch.setattr(sys, "argv", ["main.py"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "nextflow_toy.py").write_text(TOY)
    (folder / "base.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def base(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(toy))
    monkeypatch.chdir(tmp_path)
    return str(toy / "base.yaml")


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code not in (0, None)
    return capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")


def write(name: str, content: str) -> str:
    Path(name).write_text(content)
    return name


def test_script_keeps_the_checkout_off_the_path(base: str, toy: Path, root: Path) -> None:
    """`python main.py` beside our `kernels`: Hugging Face's package of that name must stay the one that is found."""
    rival = toy / "rival"
    (rival / "kernels").mkdir(parents=True)
    (rival / "kernels" / "__init__.py").write_text("origin = 'rival'\n")
    (toy / "nextflow_probe.py").write_text(
        "import kernels\nfrom nextflow_toy import Model\nclass Probe(Model):\n"
        "    def __init__(self):\n        super().__init__()\n        print('kernels:', kernels.origin)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{toy}{os.pathsep}{rival}"}
    command = [sys.executable, str(root / "main.py"), "fit", "-c", base, "--model", "nextflow_probe.Probe"]
    result = subprocess.run(command, env=environment, cwd=Path.cwd(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "kernels: rival" in result.stdout


def test_help_names_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(subcommand in text for subcommand in ("fit", "validate", "test", "predict", *MORE))


def test_help_of_a_subcommand_names_classes_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = "".join(capsys.readouterr().out.split())
    for package, classes in (("lightning_modules", MODELS), ("datamodules", DATA)):
        for name in classes:
            module, kind = name.split(".")
            assert name in text and hasattr(import_module(f"nextflow.{package}.{module}"), kind)


def test_help_shows_docstrings_under_fields(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "nextflow_toy.Model"])
    assert "Number of inputs of the toy." in capsys.readouterr().out


def test_print_config_round_trip(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = printed_config(capsys, "-c", base, "--model.config.width", "5")
    again = printed_config(capsys, "-c", write("printed.yaml", yaml.safe_dump(first)))
    assert again == first
    assert first["model"]["init_args"]["config"]["width"] == 5


def test_later_configs_win_and_a_class_swap_keeps_shared_arguments(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write("small.yaml", "data: {init_args: {batch_size: 4}}\ntrainer: {max_steps: 7}\n")
    other = write("other.yaml", "data: {class_path: nextflow_toy.OtherData}\n")
    config = printed_config(capsys, "-c", base, "-c", small, "-c", other, "--trainer.max_steps=9")
    assert config["trainer"]["max_steps"] == 9
    assert config["data"] == {"class_path": "nextflow_toy.OtherData", "init_args": {"batch_size": 4, "shuffle": False}}


def test_callbacks_plus_appends_and_callbacks_replaces(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = "[{class_path: lightning.pytorch.callbacks.LearningRateMonitor}]"
    appended = write("append.yaml", f"trainer: {{callbacks+: {monitor}}}\n")
    replaced = write("replace.yaml", f"trainer: {{callbacks: {monitor}}}\n")

    def names(*configs: str) -> list[str]:
        arguments = [argument for config in configs for argument in ("-c", config)]
        callbacks = printed_config(capsys, *arguments)["trainer"]["callbacks"]
        return [callback["class_path"].rsplit(".")[-1] for callback in callbacks]

    assert names(base, appended) == ["ModelCheckpoint", "LearningRateMonitor"]
    assert names(base, replaced) == ["LearningRateMonitor"]


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("trainer: {max_stepz: 3}", "max_stepz"),
        ("model: {init_args: {ratee: 0.1}}", "ratee"),
        ("model: {init_args: {config: {widht: 3}}}", "widht"),
        ("data: {init_args: {batchsize: 3}}", "batchsize"),
        ("modle: {class_path: nextflow_toy.Model}", "modle"),
    ],
)
def test_misspelt_keys_are_named(base: str, capsys: pytest.CaptureFixture[str], content: str, key: str) -> None:
    message = refusal(capsys, "fit", "-c", base, "-c", write("typo.yaml", content))
    assert re.search(rf"'([\w.]+\.)?{key}[.']", message)
    assert len(message.splitlines()) < 15


def test_misspelt_options_are_not_taken_for_what_they_begin(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse would read `--model.rat` as an abbreviation."""
    assert "'rat' is not accepted" in refusal(capsys, "fit", "-c", base, "--model.rat", "0.5")
    assert "--trainer.max_step" in refusal(capsys, "fit", "-c", base, "--trainer.max_step", "5")


def test_our_errors_are_one_line(
    base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(capsys, "fit", "-c", base, "--model.level", "300")
    assert message.splitlines()[-2].startswith("error: ") and "256" in message and "Traceback" not in message
    monkeypatch.setenv("NEXTFLOW_TRACEBACK", "1")
    with pytest.raises(ValueError, match="256"):
        main(["fit", "-c", base, "--model.level", "300"])


def test_bugs_keep_their_traceback(base: str) -> None:
    """A ValueError that our code did not raise on purpose (here int("broken") in a user's module) is not hidden."""
    with pytest.raises(ValueError, match="broken"):
        main(["fit", "-c", base, "--model.broken", "true"])


def test_missing_config_is_named(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothere.yaml" in refusal(capsys, "fit", "-c", "nothere.yaml")


@pytest.mark.parametrize(
    ("subcommand", "path"), [("fit", "gone/last.ckpt"), ("predict", "gone/last.ckpt"), ("predict", "last")]
)
def test_missing_checkpoint_is_explained(
    base: str, capsys: pytest.CaptureFixture[str], subcommand: str, path: str
) -> None:
    message = refusal(capsys, subcommand, "-c", base, "--ckpt_path", path)
    assert repr(path) in message and "LastCheckpoint" in message and "Traceback" not in message


def test_ckpt_path_last_starts_then_resumes(base: str) -> None:
    """The documented way to write a command that can be repeated after an interruption."""
    first = cli(["fit", "-c", base, "--ckpt_path", "last"])
    assert first.trainer.global_step == 2
    second = cli(["fit", "-c", base, "--ckpt_path", "last", "--trainer.max_steps", "5"])
    assert second.trainer.ckpt_path is None or "last.ckpt" in str(second.trainer.ckpt_path)
    assert second.trainer.global_step == 5
    assert second.trainer.fit_loop.epoch_loop.batch_progress.total.completed == 5


def test_config_wins_over_hyper_parameters_in_the_checkpoint(base: str) -> None:
    cli(["fit", "-c", base])
    resumed = cli(
        ["fit", "-c", base, "--ckpt_path", "checkpoints/last.ckpt", "--trainer.max_steps", "3", "--model.rate", "0.5"]
    )
    assert resumed.model.rate == 0.5
    assert torch.load("checkpoints/last.ckpt", weights_only=False)["global_step"] == 3


def test_without_run_objects_are_built_only(base: str) -> None:
    built = cli(["-c", base], run=False)
    assert isinstance(built, NextFlowCLI)
    assert built.trainer.global_step == 0 and not Path("checkpoints").exists()
