"""The checks of tokenizers, on curves that are drawn; test_command.py has real ones."""

import numpy as np
import pytest

from nextflow.diagnosis.tokenizer import check_branches, check_codebook, check_reconstruction, check_terms

CONFIG = {
    "model": {
        "init_args": {
            "tokenizer": {"codebook_size": 4096, "revive_interval": 10, "revive_below": 0.1},
            "init_from": "x.ckpt",
        }
    }
}


@pytest.mark.parametrize(
    ("usage", "severity"),
    [([0.9, 0.97], None), ([0.3, 0.4], "warning"), ([0.2, 0.1], "fault"), ([0.99, 0.7], "warning")],
)
def test_usage(drawn, findings, usage, severity) -> None:
    found = findings(check_codebook(drawn({"tokenizer/usage": usage}, CONFIG)))
    assert (found["dead codebook"].severity if found else None) == severity


def test_dead_entries_are_counted_and_revival_named(drawn, findings, missing) -> None:
    off = {"model": {"init_args": {"tokenizer": {"codebook_size": 4096, "revive_interval": 0}}}}
    finding = findings(check_codebook(drawn({"tokenizer/usage": [0.25 - 1 / 4096]}, off)))["dead codebook"]
    assert "3,073 of 4,096 entries" in finding.seen and "revive_interval to 10 (it is 0" in finding.advice
    assert missing(check_codebook(drawn({"train/loss": [1.0]}, off))) == ["codebook usage"]


def test_a_few_entries_that_are_nearly_always_taken(drawn, findings) -> None:
    run = drawn({"tokenizer/usage": [1.0], "tokenizer/perplexity": [100.0]}, CONFIG)
    assert "uneven codebook" in findings(check_codebook(run))
    assert not findings(check_codebook(drawn({"tokenizer/usage": [1.0], "tokenizer/perplexity": [900.0]}, CONFIG)))


def test_reconstruction(drawn, findings, missing) -> None:
    assert not findings(check_reconstruction(drawn({"val/psnr": [17, 20, 22, 21.8]}, CONFIG)))
    assert (
        "22 dB at step 2"
        in findings(check_reconstruction(drawn({"val/psnr": [17, 20, 22, 19]}, CONFIG)))["reconstruction"].seen
    )
    assert findings(check_reconstruction(drawn({"val/psnr": [8, 9]}, {})))["reconstruction"].severity == "fault"
    assert missing(check_reconstruction(drawn({"train/loss": [1]}))) == ["reconstruction"]


def test_the_half_that_does_not_choose(drawn, findings) -> None:
    """Errors are near 2 where an entry is at a right angle to what it stands for."""
    curves = {"tokenizer/error_pixel/scale_02": [0.2], "tokenizer/error_semantic/scale_02": [1.9]}
    assert list(findings(check_branches(drawn(curves, CONFIG)))) == ["semantic codebook"]


def test_features_and_discriminator(drawn, findings) -> None:
    steady = np.full(50, 0.3)
    assert not findings(check_terms(drawn({"train/loss_residual": steady, "train/loss_discriminator": 3 * steady})))
    away = {"train/loss_residual": np.linspace(0.1, 5, 50), "train/loss_discriminator": np.linspace(1, 0, 50) ** 3}
    assert set(findings(check_terms(drawn(away)))) == {"features", "discriminator"}
