"""Drawing what a step predicts: one text id per request, or the codes of one scale.

Shapes: R rows of a step, N positions of the longest window, M predicted positions, D width, V ids of one kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nextflow.generation.job import Job
from nextflow.generation.rows import Row
from nextflow.generation.sampling import Rule, Sample, SamplingConfig, draw_noise, guidance_scale, guide, sample
from nextflow.sequence.layout import UNKNOWN_CODE

if TYPE_CHECKING:
    from nextflow.models.transformer.model import Transformer

# Logits that are held at once: 64 MiB in float32. Level 1024 with 16,384 codes would need 256 MiB per picture and side.
LOGITS = 2**24
# On a CPU fewer, 16 MiB: larger blocks would be new memory for every op, and leave the cache between them.
CPU_LOGITS = 2**22


class Fed(NamedTuple):
    """Hidden states of a step."""

    hidden_RND: Tensor
    place: dict[Row, int]
    """Which r is whose; equal prompts share one."""
    counts: list[int]
    """Positions of each r that are not padding."""

    def last(self, rows: list[Row], counts: list[int]) -> Tensor:
        """Hidden states [M, D] of the last `counts[i]` positions of each row."""
        N = self.hidden_RND.shape[1]
        ends = [self.place[row] * N + self.counts[self.place[row]] for row in rows]
        index_M = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts)])
        return self.hidden_RND.flatten(0, 1)[index_M.to(self.hidden_RND.device)]


def draw_ids(transformer: Transformer, jobs: list[Job], fed: Fed, sampling: SamplingConfig, logprobs: bool) -> None:
    """Draw a text id, `<boi>` or the end for each job."""
    vocabulary = transformer.vocabulary
    hidden_MD = fed.last([job.rows[0] for job in jobs], [1] * len(jobs))
    logits_MV = transformer.text_logits(hidden_MD).float()
    allowed = [job.allowed() for job in jobs]
    logits_MV[:, vocabulary.eoi] = -torch.inf
    for index, rule in enumerate(allowed):
        if not rule.text:  # <boi> or the end, if anything
            others = [vocabulary.boi, vocabulary.end_id]
            kept = logits_MV[index, others]
            logits_MV[index] = -torch.inf
            logits_MV[index, others] = kept
        if not rule.boi:
            logits_MV[index, vocabulary.boi] = -torch.inf
        if not rule.end:
            logits_MV[index, vocabulary.end_id] = -torch.inf
    drawn = sample(logits_MV, _noise(jobs, [1] * len(jobs), logits_MV.device), sampling.of_text())
    free = [rule.text or rule.end for rule in allowed]
    for job, is_action, sampled in zip(jobs, free, drawn.sampled_logprob_M.cpu().split(1)):
        job.sampled_logprobs += [sampled] if is_action else []
    if logprobs:
        logprob_M = transformer.cross_entropy(hidden_MD, drawn.index_M).log_prob_N.cpu()
        for job, is_action, logprob in zip(jobs, free, logprob_M.split(1)):
            job.logprobs += [logprob] if is_action else []
    for job, is_action, id in zip(jobs, free, drawn.index_M.tolist()):
        job.take_id(id, is_action)


def draw_codes(transformer: Transformer, jobs: list[Job], fed: Fed, sampling: SamplingConfig, logprobs: bool) -> None:
    """Draw the codes of the scale that all jobs stand at; given ones are kept."""
    scale = jobs[0].scale
    assert scale is not None
    counts = [job.num_drawn for job in jobs]
    conditional_MD = fed.last([job.rows[0] for job in jobs], counts)
    device = conditional_MD.device
    t = [guidance_scale(job.request.guidance, scale, len(job.grids)) for job in jobs]
    unconditional_MD, t_M = None, torch.tensor(t).repeat_interleave(torch.tensor(counts)).to(device)
    if any(t):
        # A request without guidance has one row, which then stands on both sides, with t = 0.
        unconditional_MD = fed.last([job.rows[-1] for job in jobs], counts)
    noise_M = _noise(jobs, counts, device)
    drawn = _sample_codes(transformer, conditional_MD, unconditional_MD, t_M, noise_M, sampling.of_scale(scale))
    given = [job.given_here() for job in jobs]
    code_M = drawn.index_M
    if any(one is not None for one in given):
        pieces = [torch.full((n,), UNKNOWN_CODE) if one is None else one for one, n in zip(given, counts)]
        given_M = torch.cat(pieces).to(device)
        code_M = torch.where(given_M == UNKNOWN_CODE, code_M, given_M)
    scores = [("sampled_logprobs", drawn.sampled_logprob_M)]
    if logprobs:
        target_M = code_M + transformer.vocabulary.code_offset
        scores.append(("logprobs", transformer.cross_entropy(conditional_MD, target_M).log_prob_N))
    for name, score_M in scores:
        for job, one, piece in zip(jobs, given, score_M.split(counts)):
            getattr(job, name).append(piece if one is None else piece[(one == UNKNOWN_CODE).to(device)])
    for job, piece in zip(jobs, code_M.split(counts)):
        job.take_codes(piece)


def _sample_codes(
    transformer: Transformer,
    conditional_MD: Tensor,
    unconditional_MD: Tensor | None,
    t_M: Tensor,
    noise_M: Tensor,
    rule: Rule,
) -> Sample:
    """Codes [M], by parts that keep the logits small."""
    size = max(1, (CPU_LOGITS if noise_M.device.type == "cpu" else LOGITS) // transformer.config.codebook_size)
    parts = []
    for start in range(0, len(noise_M), size):
        part = slice(start, start + size)
        logits_MV = transformer.code_logits(conditional_MD[part]).float()
        if unconditional_MD is not None:
            logits_MV = guide(logits_MV, transformer.code_logits(unconditional_MD[part]).float(), t_M[part])
        parts.append(sample(logits_MV, noise_M[part], rule))
    return Sample(*(torch.cat(pieces) for pieces in zip(*parts)))


def _noise(jobs: list[Job], counts: list[int], device: torch.device) -> Tensor:
    """Uniform numbers of each job's own generator: exactly one per position, given or not."""
    return torch.cat([draw_noise(job.generator, count) for job, count in zip(jobs, counts)]).to(device)
