"""The verdict's rule, the list of findings against the configs that exist, and the table from stored figures."""

import json
from pathlib import Path

import numpy as np
import pytest

from nextflow.benchmarks.ablations import ARMS, CONFIGS
from nextflow.benchmarks.findings import FAILS, FINDINGS, HOLDS, MISSING, NOISY, RESULTS, table, values_of, verdict
from nextflow.benchmarks.scene_judge import merged

ABLATIONS = [finding for finding in FINDINGS if finding.experiment == "ablations"]


# Standard deviation 0.1 in both arms, two seeds each: e = 2.92 * 0.1 * sqrt(1/2 + 1/2) = 0.292.
@pytest.mark.parametrize(
    ("difference", "said"), [(0.30, HOLDS), (0.28, NOISY), (0.0, NOISY), (-0.28, NOISY), (-0.30, FAILS)]
)
def test_verdict_asks_for_more_than_the_seeds_leave_open(difference: float, said: str) -> None:
    half = 0.1 / 2**0.5
    first, second = [1 + difference - half, 1 + difference + half], [1 - half, 1 + half]
    assert verdict(first, second, better="higher") == said
    assert verdict([-value for value in first], [-value for value in second], better="lower") == said


def test_claim_of_no_harm_has_its_tolerance() -> None:
    text, pictures = [5.02, 5.03], [5.00, 5.01]
    assert verdict(text, pictures, better="lower") == NOISY
    assert verdict(text, pictures, better="lower", tolerance=0.01) == HOLDS
    assert verdict([5.2, 5.21], pictures, better="lower", tolerance=0.01) == FAILS


def test_one_seed_says_nothing_and_none_is_not_run() -> None:
    assert verdict([1.0], [2.0, 2.1], better="lower") == NOISY
    assert verdict([], [2.0, 2.1], better="lower") == MISSING


@pytest.mark.parametrize("seeds", [2, 3])
def test_arms_that_are_alike_seldom_get_a_verdict(seeds: int) -> None:
    """One of twenty each way, whatever the number of seeds."""
    draws = np.random.default_rng(0).normal(size=(4000, 2, seeds)).tolist()
    said = [verdict(first, second, better="lower") for first, second in draws]
    assert said.count(HOLDS) / len(said) == pytest.approx(0.05, abs=0.01)
    assert said.count(FAILS) / len(said) == pytest.approx(0.05, abs=0.01)


def test_letters_run_from_a_to_h() -> None:
    assert sorted({finding.letter for finding in FINDINGS}) == list("abcdefgh")


def test_every_ablation_is_an_arm_and_every_arm_a_config(root: Path) -> None:
    assert {arm for finding in ABLATIONS for arm in finding.arms} <= set(ARMS)
    files = {str(path.relative_to(root / CONFIGS).with_suffix("")) for path in (root / CONFIGS).rglob("*.yaml")}
    assert files == set(ARMS)


@pytest.mark.parametrize("name", ARMS)
def test_arm_is_the_command_in_its_lab_note(name: str, root: Path) -> None:
    note = (root / CONFIGS / f"{name}.yaml").read_text()
    command = "python main.py fit " + " ".join(f"-c {config}" for config in ARMS[name].all_configs)
    assert f"#   {command}\n" in note


@pytest.mark.parametrize("finding", ABLATIONS, ids=lambda finding: f"{finding.letter}: {finding.measure}")
def test_both_arms_have_one_budget(finding, root: Path) -> None:
    """As many batches of as many pictures, of models of one shape."""
    one, other = (merged([root / config for config in ARMS[arm].all_configs]) for arm in finding.arms)
    for path in ("trainer/max_steps", "data/init_args/batches_per_epoch", "data/init_args/batch_size"):
        values = []
        for config in (one, other):
            for key in path.split("/"):
                config = config.get(key, {})
            values.append(config)
        assert values[0] == values[1], path


def test_table_is_made_of_stored_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finding = next(finding for finding in FINDINGS if finding.letter == "d")

    def store(arm: str, seed: int, values: dict[str, float]) -> None:
        path = Path(RESULTS["ablations"].format(arm=arm, seed=seed))
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))

    for seed, losses in ((1, (2.0, 3.0, 4.0, 5.0)), (2, (2.1, 3.1, 4.1, 5.1))):
        for arm, more in zip(finding.arms, (0.0, 1.0)):
            store(arm, seed, {metric: loss + more for metric, loss in zip(finding.metrics, losses)})
    store(finding.arms[0], 3, {finding.metrics[0]: 2.0})  # cut off before the others were measured

    assert values_of(finding, finding.arms[0]) == {1: pytest.approx(3.5), 2: pytest.approx(3.6)}
    (line,) = table([finding]).splitlines()[2:]
    assert line.startswith("| d | reweighting")
    assert "`level_64` 3.550 ± 0.071 | `alpha_0` 4.550 ± 0.071 | 2 | *holds* |" in line


def test_table_without_figures_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = table(FINDINGS).splitlines()
    assert len(lines) == 2 + len(FINDINGS)
    assert all(line.endswith(f"*{MISSING}* |") for line in lines[2:])
