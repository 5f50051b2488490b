"""From what generation drew to what a learner scores: the same documents, with targets at the actions alone.

A learner's log-probabilities of `action_rows(...)` are `GenerationResult.logprobs`, in order: both are log-softmax over the
whole vocabulary of the head, by `Transformer.cross_entropy`; they differ by the rounding of cached against packed attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nextflow.generation.requests import GenerationResult
from nextflow.sequence.documents import Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import IGNORE, PackedRows, lay_out


def action_rows(results: Sequence[GenerationResult], vocabulary: Vocabulary, layout: LayoutConfig) -> PackedRows:
    """Lay finished answers out, one per row, for teacher forcing.

    Returns:
        rows whose `target_BL` is IGNORE everywhere but where an action was drawn (a text id, `<boi>`, the end, a code);
        `target_scale_BL` tells the scale of each, 0 for text. Weights are 1 at actions.

    Raises ValueError when a result is a preview.
    """
    if not all(result.finished for result in results):
        raise ValueError("a preview has no actions to score: take results whose `finished` is True")
    rows = lay_out([[result.document] for result in results], vocabulary, layout)
    target_BL = torch.full_like(rows.target_BL, IGNORE)
    for row, result in enumerate(results):
        # Answers are trained on and prompts are not, so the targets are the answer's ids in order, then the end.
        position_A = (rows.target_BL[row] != IGNORE).nonzero().squeeze(1)
        position_A = position_A[: len(result.is_action)][result.is_action]
        target_BL[row, position_A] = rows.target_BL[row, position_A]
    return replace(rows, target_BL=target_BL, weight_BL=(target_BL != IGNORE).float())
