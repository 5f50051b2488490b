"""Who may import whom (the table in README.md), read from the source of every file without importing it.

`if TYPE_CHECKING:` imports are looser in one place: modules and callbacks may name the batch types of
`datamodules.batches` in annotations, the contract between data and modules, as they never need them at run time.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = {"sequence", "kernels", "models", "generation", "rewards", "evaluation"}
ALLOWED: dict[str, set[str]] = {
    "sequence": set(),
    "kernels": set(),
    "models": {"kernels", "sequence"},
    "generation": {"models", "sequence", "kernels"},
    "rewards": {"generation"},
    "evaluation": {"generation"},
    "datamodules": {"sequence"},
    "lightning_modules": LIBRARY,
    "callbacks": {"sequence", "evaluation"},
    "planning": {"models", "sequence", "lightning_modules"},
    "diagnosis": set(),
}
TYPES_ONLY = {"lightning_modules": "nextflow.datamodules.batches", "callbacks": "nextflow.datamodules.batches"}
WITHOUT_LIGHTNING = {"models", "sequence", "kernels", "generation", "evaluation", "diagnosis"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


class Import(NamedTuple):
    module: str
    line: int
    types_only: bool


def imports_of(source: str, package: str) -> Iterator[Import]:
    """All imports, at any depth, as absolute names; `package` resolves relative ones."""

    def walk(node: ast.AST, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, types_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, node.module] if node.module else parents)
            # `from nextflow import models` names a folder in its alias; `from nextflow.models import x` names a symbol.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "nextflow" else [base]
            yield from (Import(name, node.lineno, types_only) for name in names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, True)
            for child in node.orelse:
                yield from walk(child, types_only)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, types_only)

    yield from walk(ast.parse(source), False)


def violations(source: str, path: Path) -> list[str]:
    """Broken rules of one file (`path` relative to the root)."""
    folder, package = path.parts[0], ".".join(["nextflow", *path.parts[:-1]])
    found = []
    for name, line, types_only in imports_of(source, package):
        parts = name.split(".")
        if parts[0] in LIGHTNING and folder in WITHOUT_LIGHTNING:
            found.append(f"{path}:{line}: imports {name}: {folder} is plain torch")
        if parts[0] in ALLOWED:
            found.append(f"{path}:{line}: imports {name}: our folders import as nextflow.{name}")
        if parts[0] != "nextflow" or len(parts) == 1 or parts[1] in ALLOWED[folder] | {folder}:
            continue
        if not (types_only and name == TYPES_ONLY.get(folder)):
            allowed = ", ".join(sorted(ALLOWED[folder])) or "nothing of ours"
            found.append(f"{path}:{line}: imports {name}: {folder} may import {allowed}")
    return found


@pytest.mark.parametrize("folder", sorted(folder for folder in ALLOWED if (ROOT / folder).is_dir()))
def test_folder_imports_only_what_its_layer_allows(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [v for file in files for v in violations(file.read_text(), file.relative_to(ROOT))] == []


def test_main_imports_lightning_only() -> None:
    modules = {module.split(".")[0] for module, _, _ in imports_of((ROOT / "main.py").read_text(), "nextflow")}
    assert "nextflow" not in modules
    assert "lightning" in modules


def test_main_hands_over_by_name() -> None:
    """`plan`, `export` and `doctor` are no subcommands of LightningCLI's: main.py passes words on, and imports only then."""
    tree = ast.parse((ROOT / "main.py").read_text())
    (named,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MORE"
    ]
    assert ast.literal_eval(named) == {
        "plan": "nextflow.planning.command",
        "export": "nextflow.lightning_modules.export",
        "doctor": "nextflow.diagnosis.command",
    }


def test_every_package_is_covered_by_a_rule() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(ALLOWED)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("models/a.py", "from nextflow.generation.cache import KVCache", "models may import kernels, sequence"),
        ("models/t/a.py", "from ...generation import cache", "models may import kernels, sequence"),
        ("models/a.py", "def f():\n    import lightning.pytorch", "models is plain torch"),
        ("kernels/a.py", "from nextflow import sequence", "kernels may import nothing of ours"),
        ("kernels/a.py", "import sequence.scales", "import as nextflow.sequence.scales"),
        ("callbacks/a.py", "from nextflow.datamodules.batches import ImageBatch", "callbacks may import"),
        ("callbacks/a.py", "if TYPE_CHECKING:\n    from nextflow.datamodules.base import X", "callbacks may import"),
    ],
)
def test_the_checker_sees_violations(file: str, source: str, message: str) -> None:
    (found,) = violations(source, Path(file))
    assert message in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("callbacks/a.py", "if TYPE_CHECKING:\n    from nextflow.datamodules.batches import ImageBatch"),
        ("models/t/a.py", "from ..tokenizer import config\nfrom nextflow.sequence.scales import Grid"),
        ("datamodules/a.py", "import lightning\nfrom nextflow.sequence import shards"),
    ],
)
def test_the_checker_allows_what_the_law_allows(file: str, source: str) -> None:
    assert violations(source, Path(file)) == []
