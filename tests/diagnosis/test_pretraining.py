"""The checks of the transformer, on curves that are drawn."""

import numpy as np
import pytest

from nextflow.diagnosis.pretraining import check_correction, check_mixture, check_scales, check_throughput


def scales(*curves, prefix: str = "train") -> dict:
    noise = 0.02 * np.random.default_rng(0).standard_normal(len(curves[0]))
    return {f"{prefix}/loss_image/scale_{number:02d}": values + noise for number, values in enumerate(curves, start=1)}


FALLING = np.linspace(8, 4, 60)
RISEN = np.concatenate([np.linspace(8, 2, 30), np.linspace(2, 4, 30)])


def test_coarse_scales_that_are_drowned(drawn, findings) -> None:
    """The failure that reweighting is for."""
    config = {"data": {"init_args": {"layout": {"alpha": 0.0}, "codebook_size": 4096}}}
    assert not findings(check_scales(drawn(scales(FALLING, FALLING, FALLING, FALLING), config)))
    finding = findings(check_scales(drawn(scales(RISEN, RISEN, FALLING, FALLING), config)))["coarse scales"]
    assert "scale_01 was lowest" in finding.seen and "so has scale 2" in finding.seen
    assert "data.layout.alpha" in finding.advice and "(now 0)" in finding.advice
    # If all rise, the run diverges, which is another finding's matter.
    assert not findings(check_scales(drawn(scales(RISEN, RISEN, RISEN, RISEN), config)))
    # The validation set counts where it has points enough: batches hold a few coarse codes each.
    both = scales(RISEN, FALLING) | scales(FALLING, FALLING, prefix="val")
    assert not findings(check_scales(drawn(both, config)))


def test_scales_that_guess(drawn, findings, missing) -> None:
    config = {"data": {"init_args": {"codebook_size": 4096}}}
    finding = findings(check_scales(drawn(scales(FALLING, np.full(60, 8.4)), config)))["scales"]
    assert "the loss of scale 2 ends at 8.39" in finding.seen and finding.severity == "warning"
    assert missing(check_scales(drawn({"train/loss_image": [3.0], **scales([3.0], [4.0])}))) == [
        "the loss of each scale"
    ]


def corrected(**options) -> dict:
    callback = {"class_path": "nextflow.callbacks.self_correction.SelfCorrection", "init_args": options}
    return {"trainer": {"callbacks": [callback]}}


RAMP = {"start": 0.0, "end": 1.0, "first_step": 10, "num_steps": 20}


@pytest.mark.parametrize(
    ("share", "options", "severity"),
    [
        (0.35, {"probability": 1.0, "fraction": 0.6}, None),
        (0.0, {"probability": 1.0, "fraction": 0.6}, "fault"),  # token shards without corrected codes
        (0.02, {"probability": 1.0, "fraction": 0.6}, "warning"),  # drawn, and nearly always the nearest
        (0.5, {"probability": 0.5, "fraction": 0.6}, "warning"),  # more than was asked for
        (0.5, {"probability": RAMP, "fraction": 0.6}, None),
        (0.5, {"probability": 0.0, "fraction": 0.6}, None),  # off
    ],
)
def test_corrected_codes(drawn, findings, share, options, severity) -> None:
    found = findings(check_correction(drawn({"train/corrected_codes": [share] * 50}, corrected(**options))))
    assert (found["self-correction"].severity if found else None) == severity


def test_correction_that_is_not_logged(drawn, missing) -> None:
    assert missing(check_correction(drawn({"train/loss": [1.0]}, corrected(probability=1.0)))) == [
        "the share of corrected codes"
    ]
    assert missing(check_correction(drawn({"train/loss": [1.0]}))) == []


def test_padding_waiting_and_speed(drawn, findings, missing) -> None:
    good = {
        "throughput/padding": [0.1] * 30,
        "throughput/data_wait": [0.02] * 30,
        "throughput/tokens_per_second": [900] * 30,
    }
    assert not findings(check_throughput(drawn(good)))
    bad = {
        "throughput/padding": [0.6] * 30,
        "throughput/data_wait": [0.5] * 30,
        "throughput/tokens_per_second": np.linspace(900, 90, 30),
    }
    found = findings(check_throughput(drawn(bad, {"data": {"init_args": {"packing": "padded", "num_workers": 0}}})))
    assert set(found) == {"padding", "waiting for data", "speed"}
    assert "now padded" in found["padding"].advice and "data.num_workers (now 0)" in found["waiting for data"].advice
    assert missing(check_throughput(drawn({"train/loss": [1.0]}))) == ["padding", "waiting for data"]


def test_a_source_that_never_came(drawn, findings) -> None:
    sources = {"drawings": {"weight": 3.0}, "edits": {"weight": 1.0}, "text": {"weight": 0.0}}
    curves = {f"mixture/documents/{name}": [float(name == "drawings")] * 8 for name in sources}
    found = findings(check_mixture(drawn(curves, {"data": {"init_args": {"sources": sources}}})))
    assert "the source edits" in found["mixture"].seen
