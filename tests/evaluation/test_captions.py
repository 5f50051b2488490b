"""Caption scores of cases worked out by hand."""

from __future__ import annotations

import math

import pytest

from nextflow.evaluation.captions import score_captions, token_f1


def test_f1_counts_repeated_words_once_for_each_time_they_are_shared():
    # shared: red, heart; precision 2/3, recall 2/2
    assert token_f1(["red", "heart", "heart"], ["red", "heart"]) == pytest.approx(0.8)
    assert token_f1([], []) == 1.0 and token_f1(["a"], []) == 0.0 and token_f1(["a"], ["b"]) == 0.0


def test_case_and_punctuation_do_not_count_but_order_does():
    scores = score_captions(["Red heart", "heart, red", "blue"], ["red heart.", "red heart", "red heart"])
    assert scores.exact[:2] == (1, 3)
    assert scores.token_f1 == pytest.approx((1 + 1 + 0) / 3)
    assert math.isnan(score_captions([], []).token_f1)
