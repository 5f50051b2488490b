"""What can go wrong with the transformer: scales that drown each other, self-correction that does nothing, idle devices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from nextflow.diagnosis.curve import Curve
from nextflow.diagnosis.finding import Finding, Missing, number
from nextflow.diagnosis.run import TrainingRun
from nextflow.diagnosis.training import said


def check_scales(run: TrainingRun) -> Iterator[Finding | Missing]:
    """All scales learn together. Unweighted, thousands of fine codes drown the few coarse ones (NextFlow section 3.2.3)."""
    for prefix in ("val", "train"):  # of few scales a batch has a few codes, so that the validation set says more
        curves = _scales(run, prefix)
        if len(curves) > 1 and all(len(curve) >= 4 for curve in curves.values()):
            break
    else:
        if run.curve("train/loss_image") is not None:
            yield Missing("the loss of each scale", "four points of train/loss_image/scale_01 and the others")
        return
    half = len(curves) // 2
    risen = {scale: rise for scale in list(curves)[:half] if (rise := curves[scale].rise()) is not None}
    falling = [scale for scale in list(curves)[half:] if curves[scale].change < 0 and curves[scale].rise() is None]
    if risen and falling:
        scale, rise = next(iter(risen.items()))
        alpha = run.setting("data.layout.alpha", 0.0)
        yield Finding(
            severity="warning",
            about="coarse scales",
            seen=f"{curves[scale].name} was lowest near step {rise.step} ({number(rise.low)}) and has risen to "
            f"{number(rise.end)}, while fine scales go on falling"
            + (f" (so has scale {', '.join(map(str, list(risen)[1:]))})" if len(risen) > 1 else ""),
            expected="coarse scales fall with the fine ones",
            advice=f"set data.layout.alpha, or alpha of the curriculum's stage, to 0.9 (now {number(alpha)})"
            if alpha < 0.9
            else f"raise data.layout.alpha further (now {number(alpha)}) or lower {said(run, 'model.optimizer.lr')}",
        )
    size = run.setting("data.codebook_size")
    if size is None:
        return
    idle = [scale for scale, curve in curves.items() if curve.last > 0.98 * math.log(size)]
    if idle:
        yield Finding(
            severity="fault" if len(idle) == len(curves) else "warning",
            about="scales",
            seen=f"the loss of scale {', '.join(map(str, idle))} ends at {number(curves[idle[0]].last)}, as good as a guess "
            f"among {size:,} codes ({number(math.log(size))})",
            expected="below that",
            advice="train longer, and see that the shards were written by model.tokenizer; fine scales come last",
        )


def check_correction(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Self-correction feeds as many wrong codes as it was told to."""
    wanted = run.callback("SelfCorrection")
    share = run.curve("train/corrected_codes")
    if wanted is None:
        return
    probability = _ramp(wanted.get("probability", 1.0), run.steps)
    fraction = _ramp(wanted.get("fraction", 0.6), run.steps)
    if probability == 0:
        return
    if share is None:
        yield Missing(
            "the share of corrected codes", "train/corrected_codes, which the callback SelfCorrection brings about"
        )
        return
    # Of the codes that are drawn anew some come out as they were, so that the share lies below the product.
    most = probability * fraction
    if share.end < 0.2 * most:
        none = "no code is" if share.end == 0 else f"only {share.end:.1%} of the codes are"
        yield Finding(
            severity="fault" if share.end == 0 else "warning",
            about="self-correction",
            seen=f"{none} fed as another one (train/corrected_codes), though SelfCorrection asks for up to {most:.0%}",
            expected=f"between {0.2 * most:.0%} and {most:.0%}",
            advice="with token shards write them again with model.correction of the tokenizer; with pictures raise "
            "SelfCorrection.temperature or top_k",
        )
    elif share.end > 1.1 * most:
        yield Finding(
            severity="warning",
            about="self-correction",
            seen=f"{share.end:.1%} of the codes are fed as another one (train/corrected_codes), more than the {most:.0%} of "
            "SelfCorrection",
            expected=f"at most {most:.0%}",
            advice="the token shards were written with a larger model.correction.fraction: write them again, or lower "
            "SelfCorrection.probability",
        )


def check_throughput(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Devices compute, on positions that are no padding."""
    padding, wait = run.curve("throughput/padding"), run.curve("throughput/data_wait")
    speed = run.curve("throughput/tokens_per_second")
    for curve, what in ((padding, "padding"), (wait, "waiting for data")):
        if curve is None:
            yield Missing(what, "the callback nextflow.callbacks.throughput.Throughput")
    if padding is not None and padding.median > 0.3:
        packing = run.setting("data.packing")
        yield Finding(
            severity="warning",
            about="padding",
            seen=f"{padding.median:.0%} of the positions are padding (throughput/padding)",
            expected="below 30 %",
            advice="set data.packing to fixed_length or fixed_budget"
            + (
                f" (now {packing})"
                if packing == "padded"
                else ", and data.max_length to a multiple of what documents need"
            ),
        )
    if wait is not None and wait.median > 0.2:
        yield Finding(
            severity="warning",
            about="waiting for data",
            seen=f"{wait.median:.0%} of the time goes into waiting for the loader (throughput/data_wait)",
            expected="below 20 %",
            advice=f"raise {said(run, 'data.num_workers')}, or train on token shards instead of pictures",
        )
    if speed is not None and len(speed.since(run.last_stage)) >= 10:
        speed = speed.since(run.last_stage).behind(0.1)
        if speed.end < 0.6 * speed.start:
            yield Finding(
                severity="note",
                about="speed",
                seen=f"throughput/tokens_per_second fell from {number(speed.start)} to {number(speed.end)}",
                expected="a steady speed",
                advice="see what else runs on the machine",
            )


def check_mixture(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Every source that has a weight was read."""
    curriculum = run.callback("ResolutionCurriculum") or {}
    if any(stage.get("mixture") for stage in curriculum.get("stages", ())):
        return
    for name, source in run.setting("data.sources", {}).items():
        share = run.curve(f"mixture/documents/{name}")
        if share is not None and len(share) >= 5 and source.get("weight", 1.0) > 0 and not share.value_N.any():
            yield Finding(
                severity="fault",
                about="mixture",
                seen=f"no document of the source {name} was read, though its weight is {number(source.get('weight', 1.0))}",
                expected="a share of the documents that goes with the weight",
                advice=f"see what data.sources.{name}.shards finds",
            )


def _scales(run: TrainingRun, prefix: str) -> dict[int, Curve]:
    """The loss of each scale over the last stage of a curriculum, by number."""
    start = f"{prefix}/loss_image/scale_"
    curves = {int(name.removeprefix(start)): run.curve(name) for name in sorted(run.curves) if name.startswith(start)}
    parts = {scale: curve.since(run.last_stage) for scale, curve in curves.items() if curve is not None}
    return {scale: curve for scale, curve in parts.items() if len(curve)}


def _ramp(value: float | Mapping[str, Any], step: int) -> float:
    """What a number or a ramp of SelfCorrection is at a step."""
    if not isinstance(value, Mapping):
        return value
    progress = (step - value.get("first_step", 0)) / value.get("num_steps", 1)
    return value["start"] + (value["end"] - value["start"]) * min(1.0, max(0.0, progress))


PRETRAINING = (check_scales, check_correction, check_throughput, check_mixture)
