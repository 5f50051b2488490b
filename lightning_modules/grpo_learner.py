"""From answers to micro-batches that a learner scores: rows of one answer each, cut behind what is trained.

Block-causal attention lets nobody see what comes later, so with prefix tuning the scales behind the last trained one are not
computed at all: of 1024 pixels with 8 of 18 scales, 204 positions instead of 8,456.

Shapes: B rows of a micro-batch, L length, T actions of a micro-batch, N answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from nextflow.generation.requests import GenerationResult
from nextflow.generation.rollouts import action_rows
from nextflow.lightning_modules.grpo_objective import (
    Actions,
    ObjectiveConfig,
    coefficients,
    propagate_mask,
    scale_weights,
)
from nextflow.lightning_modules.grpo_rollouts import RolloutConfig, Stage
from nextflow.sequence.documents import Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import IGNORE, UNKNOWN_CODE, PackedRows


class MicroBatch(NamedTuple):
    """Some answers, ready to be scored."""

    rows: PackedRows
    """`target_BL` is IGNORE everywhere but at trained actions."""
    place_T: Tensor
    """int64, flat positions b * L + l of the trained actions."""
    actions: Actions
    """Their coefficients are weights until `normalise` has seen the whole batch."""
    sampler_T: Tensor
    """float32, log-probability of each action as the roll-out saw it."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        actions = Actions(*(value.to(device) for value in self.actions))
        return MicroBatch(self.rows.to(device), self.place_T.to(device), actions, self.sampler_T.to(device))


def micro_batches(
    results: Sequence[GenerationResult],
    masks: Sequence[Tensor | None],
    stage: Stage,
    *,
    size: int,
    vocabulary: Vocabulary,
    layout: LayoutConfig,
    rollouts: RolloutConfig,
    objective: ObjectiveConfig,
) -> list[MicroBatch]:
    """Lay answers out for the learner.

    Args:
        results: N answers, with `logprobs`.
        masks: where in each picture (bool [H, W]) its reward comes from; None for everywhere.
        stage: decides which scales are trained.
        size: answers of a micro-batch.
        vocabulary: ids of the transformer.
        layout: the layout that it was trained with.
        rollouts: which scales are trained.
        objective: alpha and the level of the ratio.
    """
    made = []
    for start in range(0, len(results), size):
        chosen = results[start : start + size]
        rows = action_rows(chosen, vocabulary, layout)
        share_BL = torch.stack(
            [
                _shares(rows, index, result, mask, stage, rollouts)
                for index, (result, mask) in enumerate(zip(chosen, masks[start : start + size]))
            ]
        )
        made.append(_micro_batch(rows, share_BL, chosen, start, objective))
    return made


def normalise(
    batches: Sequence[MicroBatch], num_answers: int, config: ObjectiveConfig, mean_over_ranks
) -> list[MicroBatch]:
    """Turn weights into the coefficients of the whole batch's loss.

    Args:
        batches: all micro-batches of this process.
        num_answers: answers of this process.
        config: `loss_type`.
        mean_over_ranks: averages one tensor over all processes.
    """
    weight_T = torch.cat([batch.actions.coefficient_T for batch in batches])
    rollout_T = torch.cat([batch.actions.rollout_T for batch in batches])
    coefficient_T = coefficients(weight_T, rollout_T, num_answers, config, mean_over_ranks(weight_T.sum()))
    pieces = coefficient_T.split([len(batch.place_T) for batch in batches])
    return [
        batch._replace(actions=batch.actions._replace(coefficient_T=piece)) for batch, piece in zip(batches, pieces)
    ]


def first_columns(rows: PackedRows, length: int) -> PackedRows:
    """Rows cut behind `length` positions. No block may be cut in two where its hidden states are wanted."""
    full = rows.ids_BL.shape[1]
    cut = {
        name: getattr(rows, name)[:, :length]
        for name in ("ids_BL", "document_BL", "block_BL", "scale_BL", "num_scales_BL", "target_BL", "weight_BL")
    }

    def kept(position: Tensor) -> tuple[Tensor, Tensor]:
        row, column = position // full, position % full
        inside = column < length
        return inside, row[inside] * length + column[inside]

    inside_N, code_position_N = kept(rows.code_position_N)
    inside_M, input_position_M = kept(rows.input_position_M)
    return replace(
        rows,
        **cut,
        position_3BL=rows.position_3BL[:, :, :length],
        code_N=rows.code_N[inside_N],
        code_position_N=code_position_N,
        input_position_M=input_position_M,
        tap_index_MT=rows.tap_index_MT[inside_M],
        tap_weight_MT=rows.tap_weight_MT[inside_M],
    )


def _shares(
    rows: PackedRows, index: int, result: GenerationResult, mask_HW: Tensor | None, stage: Stage, config: RolloutConfig
) -> Tensor:
    """float32 [L] of one row: what part each position has in the loss before any weight."""
    is_action_L = rows.target_BL[index] != IGNORE
    scale_L = rows.target_scale_BL[index]
    trained = torch.tensor([config.trains(stage, scale) for scale in range(int(scale_L.max()) + 1)])
    share_L = (is_action_L & trained[scale_L]).float()
    if mask_HW is not None and len(result.codes):
        share_N = propagate_mask(mask_HW, result.request.grids)
        if result.request.given is not None:
            share_N = share_N[result.request.given == UNKNOWN_CODE]
        place = (is_action_L & (scale_L > 0)).nonzero().squeeze(1)[-len(share_N) :]  # of the last picture
        share_L[place] *= share_N
    return share_L


def _micro_batch(
    rows: PackedRows, share_BL: Tensor, results: Sequence[GenerationResult], start: int, config: ObjectiveConfig
) -> MicroBatch:
    # Weights are made with all actions in sight: the cells of a scale count even where a mask leaves some out.
    sampler_BL = torch.zeros_like(share_BL)
    is_action_BL = rows.target_BL != IGNORE
    sampler_BL[is_action_BL] = torch.cat([result.logprobs for result in results if result.logprobs is not None])
    row_T, column_T = is_action_BL.nonzero(as_tuple=True)
    step_T = row_T * (int(rows.block_BL.max()) + 1) + rows.block_BL[row_T, column_T]
    scale_T, share_T = rows.target_scale_BL[row_T, column_T], share_BL[row_T, column_T]
    per_step = config.importance_sampling_level == "scale"
    weight_T = scale_weights(scale_T, step_T, row_T, share_T, config.alpha, per_step)
    kept_T = weight_T > 0
    row_T, column_T, step_T, scale_T, weight_T = (
        value[kept_T] for value in (row_T, column_T, step_T, scale_T, weight_T)
    )
    trained_BL = torch.zeros_like(is_action_BL)
    trained_BL[row_T, column_T] = True
    target_BL = rows.target_BL.masked_fill(~trained_BL, IGNORE)
    # A scale is kept whole: its cells see each other.
    last_B1 = rows.block_BL.masked_fill(~trained_BL, -1).amax(dim=1, keepdim=True)
    inside_BL = (rows.block_BL <= last_B1) & (rows.document_BL >= 0)
    length = max(1, int(inside_BL.sum(dim=1).max()))
    cut = first_columns(replace(rows, target_BL=target_BL), length)
    return MicroBatch(
        cut,
        row_T * length + column_T,
        Actions(row_T + start, step_T, scale_T, weight_T),
        sampler_BL[row_T, column_T],
    )
