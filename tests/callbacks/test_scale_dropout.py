"""Scale dropout: a function of (seed, step); the first scale stays; half of the others go; the schedule of its probability."""

from types import SimpleNamespace

import pytest

from nextflow.callbacks.scale_dropout import ScaleDropout


def test_draws_are_a_function_of_seed_and_step():
    first, second, other = ScaleDropout(seed=1), ScaleDropout(seed=1), ScaleDropout(seed=2)
    draws = [first.keep_at(step, 12) for step in range(50)]
    assert draws == [second.keep_at(step, 12) for step in range(50)]
    assert draws != [other.keep_at(step, 12) for step in range(50)]
    assert len(set(draws)) > 40


def test_half_of_the_scales_but_never_the_first():
    draws = [ScaleDropout().keep_at(step, 8) for step in range(2000)]
    assert all(draw[0] for draw in draws)
    for scale in range(1, 8):
        assert sum(draw[scale] for draw in draws) / 2000 == pytest.approx(0.5, abs=0.04)
    dropped_together = sum(not draw[1] and not draw[2] for draw in draws) / 2000
    assert dropped_together == pytest.approx(0.25, abs=0.04)  # independent of each other


def test_probability_starts_rises_and_stops():
    callback = ScaleDropout(probability=0.8, start_step=10, ramp_steps=4, stop_step=20)
    assert callback.probability_at(9) == 0.0
    assert [callback.probability_at(step) for step in (10, 11, 12, 13, 19)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert callback.probability_at(20) == 0.0
    assert callback.keep_at(5, 8) is None and callback.keep_at(25, 8) is None
    share = sum(ScaleDropout(probability=0.3).keep_at(step, 8) is not None for step in range(2000)) / 2000
    assert share == pytest.approx(0.3, abs=0.04)


def test_sets_the_modules_attribute_for_the_batch_alone():
    callback, module = ScaleDropout(seed=3), SimpleNamespace(scale_keep=None)
    trainer, batch = SimpleNamespace(global_step=7), SimpleNamespace(grids=((1, 1), (2, 2), (4, 4)))
    callback.on_train_batch_start(trainer, module, batch, 0)
    assert module.scale_keep == callback.keep_at(7, 3) and len(module.scale_keep) == 3
    callback.on_train_batch_end(trainer, module, None, batch, 0)
    assert module.scale_keep is None


def test_shares_outside_of_zero_and_one_are_errors():
    with pytest.raises(ValueError, match="share"):
        ScaleDropout(share=1.5)
