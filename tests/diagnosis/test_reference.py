"""References: recorded from runs, read back, and what leaves their ranges is named with what is set differently."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from nextflow.diagnosis.examination import FIGURES
from nextflow.diagnosis.reference import compare, differences, read, record, reference_of, settings_of, widen, write

ROOT = Path(__file__).resolve().parents[2]
REFERENCES = sorted((ROOT / "configs").glob("*/reference/*.yaml"))


def config(rate: float = 0.001, **trainer) -> dict:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": rate, "betas": [0.9, 0.95], "foreach": None}}
    model = {
        "class_path": "a.B",
        "init_args": {"optimizer": optimizer, "tokenizer": "runs/x/last.ckpt", "attention": "auto"},
    }
    return {
        "trainer": {"max_steps": 100, "log_every_n_steps": 1, **trainer},
        "model": model,
        "data": {"init_args": {"batch_size": 4}},
    }


def curves(offset: float = 0.0, seed: int = 0) -> dict:
    noise = 0.05 * np.random.default_rng(seed).standard_normal(100)
    return {
        "train/loss_image": 4 + 4 * np.exp(-np.arange(100) / 20) + noise + offset,
        "val/loss_image": np.array([6.0, 5.0, 4.6]) + offset,
    }


def test_a_run_lies_within_what_was_recorded_from_it_and_from_its_like(drawn) -> None:
    reference = record(drawn(curves(), config()))
    assert set(reference.metrics) == {"train/loss_image", "val/loss_image"}
    assert list(reference.metrics["val/loss_image"]) == [0, 1, 2]
    assert list(reference.metrics["train/loss_image"]) == [20, 40, 60, 80, 99]
    for seed in (0, 1):
        assert list(compare(drawn(curves(seed=seed), config()), reference)) == []


def test_what_is_off_is_named_with_the_setting_that_differs(drawn, findings) -> None:
    reference = record(drawn(curves(), config()))
    run = drawn(curves(offset=0.4), config(rate=0.1))
    said = list(compare(run, reference))
    finding = findings(said)["reference"]
    assert finding.severity == "warning" and "val/loss_image is 5 at step 2" in finding.seen
    assert "model.optimizer.lr is 0.1, not 0.001" in finding.advice
    assert findings(said)["settings"].severity == "note"
    assert findings(compare(drawn(curves(offset=3), config()), reference))["reference"].severity == "fault"
    better = findings(compare(drawn(curves(offset=-0.8), config()), reference))["reference"]
    assert better.severity == "note" and "better than the reference" in better.seen


def test_an_unfinished_run_is_compared_as_far_as_it_is(drawn, missing) -> None:
    reference = record(drawn(curves(), config()))
    half = {"train/loss_image": curves()["train/loss_image"][:50]}
    said = list(compare(drawn(half, config()), reference))
    assert len(said) == 1 and missing(said) == ["val/loss_image against the reference"]
    with pytest.raises(ValueError, match="only a whole run"):
        record(drawn(half, config()))


def test_widening(drawn) -> None:
    first, other = drawn(curves(), config()), drawn(curves(offset=0.8), config())
    wide = widen(record(first), other)
    assert list(compare(first, wide)) == list(compare(other, wide)) == []
    with pytest.raises(ValueError, match=r"lr is 0.5, not 0.001"):
        widen(wide, drawn(curves(), config(rate=0.5)))


def test_files(drawn, tmp_path) -> None:
    run = drawn(curves(), config())
    reference = record(run)
    path = tmp_path / "new" / "reference.yaml"
    write(reference, path, "python main.py doctor runs/x --record")
    assert read(path) == reference
    assert path.read_text().splitlines()[1] == "#   python main.py doctor runs/x --record"
    path.write_text("a: 1")
    with pytest.raises(ValueError, match="is no reference"):
        read(path)


def test_settings_are_numbers_and_words_that_change_results() -> None:
    settings = settings_of(config(precision="bf16-mixed"))
    assert settings == {
        "trainer.precision": "bf16-mixed", "trainer.max_steps": 100, "model.optimizer.class_path": "torch.optim.AdamW",
        "model.optimizer.lr": 0.001, "model.optimizer.betas": [0.9, 0.95], "model.attention": "auto",
        "model.class_path": "a.B", "data.batch_size": 4,
    }  # fmt: skip


def test_settings_that_only_one_side_has_are_none_of_the_differences(drawn) -> None:
    """Options come and go with versions."""
    reference = record(drawn(curves(), config(precision="32-true")))
    assert differences(reference, drawn(curves(), config())) == []


def test_place_of_a_reference(drawn) -> None:
    logger = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs/openmoji", "name": "pretrain_64"}}
    run = drawn(curves(), {"trainer": {"logger": logger}})
    assert reference_of(run, ROOT) == ROOT / "configs/openmoji/reference/pretrain_64.yaml"
    logger["init_args"]["save_dir"] = "runs/mine"
    assert reference_of(drawn(curves(), {"trainer": {"logger": logger}}), ROOT) is None
    assert reference_of(drawn(curves()), ROOT) is None


@pytest.mark.parametrize("path", REFERENCES, ids=[f"{path.parts[-3]}/{path.stem}" for path in REFERENCES])
def test_stored_references(path: Path) -> None:
    """Each is of figures that doctor has, in ranges, and says how it was made."""
    reference = read(path)
    assert set(reference.metrics) <= {figure.name for figure in FIGURES[reference.kind]}
    assert all(one.low < one.high for ranges in reference.metrics.values() for one in ranges.values())
    assert all(step < reference.steps for ranges in reference.metrics.values() for step in ranges)
    assert path.read_text().splitlines()[1] == f"#   python main.py doctor runs/{path.parts[-3]}/{path.stem} --record"
    assert yaml.safe_load(path.read_text())["settings"]
