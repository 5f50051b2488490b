"""What can go wrong with a tokenizer: dead codes, halves that say nothing, features that run away, a winning discriminator."""

from __future__ import annotations

from collections.abc import Iterator

from nextflow.diagnosis.finding import Finding, Missing, number
from nextflow.diagnosis.run import TrainingRun
from nextflow.diagnosis.training import said

NO_BETTER_THAN_CHANCE = 1.5
"""Squared distance of unit vectors: 2 is a right angle."""


def check_codebook(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Most entries are used, and about equally often."""
    usage, perplexity = run.curve("tokenizer/usage"), run.curve("tokenizer/perplexity")
    if usage is None:
        yield Missing("codebook usage", "tokenizer/usage: a validation split and trainer.val_check_interval")
        return
    size = run.setting("model.tokenizer.codebook_size")
    dead = "" if size is None else f": {round((1 - usage.last) * size):,} of {size:,} entries stand for nothing"
    revive = run.setting("model.tokenizer.revive_interval")
    repair = (
        "set model.tokenizer.revive_interval to 10 (it is 0, and unused entries stay dead)"
        if revive == 0
        else f"lower {said(run, 'model.tokenizer.revive_interval')}, raise {said(run, 'model.tokenizer.revive_below')} or "
        f"{said(run, 'model.losses.entropy')}"
    )
    best = usage.value_N.max()
    if usage.last < 0.5:
        yield Finding(
            severity="fault" if usage.last < 0.25 else "warning",
            about="dead codebook",
            seen=f"tokenizer/usage is {number(usage.last)} at step {usage.step_N[-1]}{dead}",
            expected="above 0.5, and near 1 in a good run",
            advice=repair + "; a codebook too large for the data looks the same: model.tokenizer.codebook_size",
        )
    elif usage.last < 0.8 * best:
        yield Finding(
            severity="warning",
            about="dead codebook",
            seen=f"tokenizer/usage has fallen from {number(best)} to {number(usage.last)}{dead}",
            expected="usage that stays",
            advice=repair,
        )
    if perplexity is not None and size is not None and perplexity.last < 0.1 * usage.last * size:
        yield Finding(
            severity="warning",
            about="uneven codebook",
            seen=f"tokenizer/perplexity is {number(perplexity.last)}: {usage.last * size:,.0f} entries are used, but a few of "
            "them nearly always",
            expected=f"above {0.1 * usage.last * size:,.0f}, a tenth of those in use",
            advice=f"raise {said(run, 'model.losses.entropy')}",
        )


def check_reconstruction(run: TrainingRun) -> Iterator[Finding | Missing]:
    """PSNR rises and stays."""
    psnr = run.curve("val/psnr")
    if psnr is None:
        yield Missing("reconstruction", "val/psnr: a validation split and trainer.val_check_interval")
        return
    best = int(psnr.value_N.argmax())
    if psnr.value_N[best] - psnr.last > 0.5:
        yield Finding(
            severity="warning",
            about="reconstruction",
            seen=f"val/psnr was {number(psnr.value_N[best])} dB at step {psnr.step_N[best]} and ends at {number(psnr.last)}",
            expected="its best at the end",
            advice=f"lower {said(run, 'model.generator_optimizer.lr')}; with losses.adversarial or perceptual above 0 some "
            "PSNR is the price of sharpness",
        )
    elif run.starts_anew and psnr.last < 12:
        yield Finding(
            severity="fault",
            about="reconstruction",
            seen=f"val/psnr ends at {number(psnr.last)} dB, which the mean colour of a picture reaches as well",
            expected="above 15 dB soon",
            advice=f"look at val/reconstruction in TensorBoard, and at {said(run, 'model.generator_optimizer.lr')}",
        )


def check_branches(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Both halves of the finest codes say something about their features."""
    for part in ("semantic", "pixel"):
        names = sorted(name for name in run.curves if name.startswith(f"tokenizer/error_{part}/"))
        error = run.curve(names[-1]) if names else None
        if error is not None and error.last > NO_BETTER_THAN_CHANCE:
            yield Finding(
                severity="warning",
                about=f"{part} codebook",
                seen=f"{error.name} is {number(error.last)}, and 2 is what random entries have",
                expected=f"below {NO_BETTER_THAN_CHANCE}",
                advice=f"raise {said(run, f'model.tokenizer.{part}_weight')}, as the other half decides nearly alone which "
                "code is taken",
            )


def check_terms(run: TrainingRun) -> Iterator[Finding | Missing]:
    """The features stay within reach of the entries, and the discriminator can be fooled."""
    residual = run.curve("train/loss_residual")
    if (
        residual is not None
        and len(residual) >= 5
        and residual.change > 0
        and residual.end > max(1.0, 4 * residual.start)
    ):
        yield Finding(
            severity="warning",
            about="features",
            seen=f"train/loss_residual grew from {number(residual.start)} to {number(residual.end)}: the features' length runs "
            "away from the entries, which have length 1",
            expected="below 1",
            advice=f"raise {said(run, 'model.losses.residual')}",
        )
    discriminator = run.curve("train/loss_discriminator")
    if discriminator is not None and len(discriminator) >= 5 and discriminator.end < 0.05:
        yield Finding(
            severity="warning",
            about="discriminator",
            seen=f"train/loss_discriminator is {number(discriminator.end)}: it tells every reconstruction from its picture, "
            "and the tokenizer learns nothing from it any more",
            expected="near 1, the loss of one that cannot tell",
            advice=f"lower {said(run, 'model.discriminator_optimizer.lr')} or raise {said(run, 'model.discriminator_start')}",
        )


TOKENIZER = (check_codebook, check_reconstruction, check_branches, check_terms)
