"""A learner's rows hold targets at actions alone, whatever was given, put or asked."""

from __future__ import annotations

import pytest
import torch

from nextflow.generation.engine import generate, stream
from nextflow.generation.requests import GenerationRequest
from nextflow.generation.rollouts import action_rows
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import IGNORE
from nextflow.sequence.scales import num_codes_of


def test_targets_are_the_actions(studio):
    transformer, layout = studio.transformer(), LayoutConfig()
    vocabulary = transformer.vocabulary
    results = generate(transformer, studio.requests(), layout=layout)
    rows = action_rows(results, vocabulary, layout)
    for row, result in enumerate(results):
        targets = rows.target_BL[row][rows.target_BL[row] != IGNORE]
        scales = rows.target_scale_BL[row][rows.target_BL[row] != IGNORE]
        request = result.request
        assert len(targets) == int(result.is_action.sum()) == len(result.sampled_logprobs)
        codes = targets[targets >= vocabulary.code_offset] - vocabulary.code_offset
        if request.task == "image":
            drawn_N = torch.ones(len(result.codes), dtype=torch.bool) if request.given is None else request.given < 0
            assert torch.equal(codes, result.codes[drawn_N]) and len(codes) == len(targets)
            cells = torch.tensor([h * w for h, w in request.grids])
            assert torch.equal(scales, torch.arange(1, len(cells) + 1).repeat_interleave(cells)[drawn_N])
        if request.task == "text":
            assert targets.tolist() == [*result.text_ids, *([vocabulary.end_id] if result.ended else [])]
            assert not scales.any()
        if request.task == "interleaved":
            pictures = len(result.segments) - sum(hasattr(segment, "ids") for segment in result.segments)
            assert (targets == vocabulary.boi).sum() == pictures
            assert len(codes) == pictures * num_codes_of(request.grids)
    assert torch.equal(rows.weight_BL > 0, rows.target_BL != IGNORE)


def test_previews_are_refused(studio):
    transformer, layout = studio.transformer(), LayoutConfig()
    request = GenerationRequest(grids=studio.schedule.grids(32))
    preview = next(stream(transformer, [request], layout=layout))
    with pytest.raises(ValueError, match="preview"):
        action_rows([preview], transformer.vocabulary, layout)
