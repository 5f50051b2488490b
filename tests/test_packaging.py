"""The wheel, installed elsewhere, brings the `nextflow` command and nothing that shadows other packages."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    # setuptools writes build/ and *.egg-info beside setup.cfg: build from a copy, as a checkout may be read-only.
    copy = tmp_path_factory.mktemp("source") / "nextflow"
    tracked = [*packages(root), "setup.cfg", "pyproject.toml", "LICENSE", "README.md", "main.py", "quickstart.py"]
    for name in tracked:
        for path in sorted((root / name).glob("*.py")) if (root / name).is_dir() else [root / name]:
            target = copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(copy)], check=True)
    (path,) = folder.glob("*.whl")
    return path


def packages(root: Path) -> list[str]:
    """Folders that setup.cfg installs, relative to the root ("." is the package itself)."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    names = config["options"]["packages"].split()
    return [name.removeprefix("nextflow").removeprefix(".").replace(".", "/") or "." for name in names]


def test_setup_cfg_lists_every_package(root: Path) -> None:
    folders = {str(path.parent.relative_to(root)) for path in root.glob("[!.]*/**/__init__.py")}
    folders = {folder for folder in folders if not folder.startswith(("tests", "runs", "build", "dist"))}
    assert folders | {"."} == set(packages(root))


def test_wheel_installs_one_top_level_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"nextflow"}
    assert "nextflow/main.py" in names
    assert "nextflow/sequence/scales.py" in names


def test_installed_command_runs_in_another_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    command = subprocess.run(
        [str(target / "bin" / "nextflow"), "--help"], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert command.returncode == 0, command.stderr
    assert all(subcommand in command.stdout for subcommand in ("fit", "validate", "test", "predict"))

    # The wheel is what is imported, not the editable checkout, and the names of our folders stay free for others.
    probe = (
        "import importlib.util, nextflow.main; print(nextflow.main.__file__);"
        "print([n for n in ('models', 'callbacks', 'sequence', 'datamodules') if importlib.util.find_spec(n)]);"
        "spec = importlib.util.find_spec('kernels'); print(spec.origin if spec else None)"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    file, shadows, kernels = result.stdout.splitlines()
    assert file == str(target / "nextflow" / "main.py")
    assert shadows == "[]"
    assert "nextflow" not in kernels
