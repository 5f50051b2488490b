"""Generation: prompts of any length, level and ratio in one batch, images scale by scale, texts id by id (NextFlow 2.2).

Every step feeds one window per row: first the whole prompt (with `<boi>` when an image follows), then one scale of the row's
own grids or one text id. A window of n predicted codes or ids is sampled, written into the row's script and becomes the next
window's input. Guidance is one more row per request, fed the same codes behind the negative prompt. Finished rows add nothing
and leave the cache once they are half of it.

Built: text (and images) to image, and images (and text) to text. A request ends with its image or its text, so text
positions draw text ids and the end.

Shapes: B rows of a step, N positions of the longest window, M predicted positions of a group, D width, V ids of one kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextflow.generation.cache import KVCache
from nextflow.generation.requests import Generated, GenerationRequest, GenerationResult
from nextflow.generation.sampling import SamplingConfig, draw_noise, guidance_scale, guide, sample
from nextflow.generation.script import Script
from nextflow.sequence.documents import Document, ImageSegment, Segment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.packing import document_length

if TYPE_CHECKING:
    from nextflow.models.tokenizer.model import Tokenizer
    from nextflow.models.transformer.model import Transformer

__all__ = ["Generated", "GenerationRequest", "GenerationResult", "generate", "stream"]


@torch.no_grad()  # not inference_mode: roll-outs are fed to a learner, which may save the codes for its backward
def generate(
    transformer: Transformer,
    requests: Sequence[GenerationRequest],
    *,
    layout: LayoutConfig,
    tokenizer: Tokenizer | None = None,
    sampling: SamplingConfig | None = None,
) -> list[GenerationResult]:
    """Answer all requests as one batch, in their order.

    Args:
        transformer: the model; its device and precision (autocast) are used.
        requests: prompts; texts as ids, images as codes.
        layout: the layout that the transformer was trained with.
        tokenizer: decodes the codes to pictures; None leaves `GenerationResult.image` empty.
        sampling: temperature, top-k, top-p; the default draws from the model's own distribution.
    """
    if not requests:
        return []
    decoding = Decoding(transformer, requests, layout=layout, sampling=sampling or SamplingConfig())
    while decoding.active:
        decoding.step()
    return _results(decoding.jobs, transformer.vocabulary.end_id, tokenizer)


@torch.no_grad()
def stream(
    transformer: Transformer,
    requests: Sequence[GenerationRequest],
    *,
    layout: LayoutConfig,
    tokenizer: Tokenizer | None = None,
    sampling: SamplingConfig | None = None,
) -> Iterator[GenerationResult]:
    """As `generate`, but yields a result for every image after each of its scales, and for every text at its end.

    Results with `finished` False are previews: their image is decoded from the scales so far.
    """
    if not requests:
        return
    decoding = Decoding(transformer, requests, layout=layout, sampling=sampling or SamplingConfig())
    while decoding.active:
        moved = decoding.step()
        shown = [job for job in moved if job.request.task == "image" or job.finished]
        yield from _results(shown, transformer.vocabulary.end_id, tokenizer)


@dataclass
class _Job:
    """What is known of one request while it is decoded."""

    index: int
    request: GenerationRequest
    generator: torch.Generator
    rows: list[int]
    """Its rows of the script: conditional, and unconditional when it is guided."""
    num_predicted: int = 1
    """Positions at the end of the current window that are predicted from."""
    scale: int = 0
    """Scale being predicted, from 0."""
    finished: bool = False
    drawn: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    sampled_logprobs: list[Tensor] = field(default_factory=list)


class Decoding:
    """The state of one batch: `step` moves every unfinished request by one scale or one text id.

    `reuse_cache=False` feeds each row from its beginning at every step: the reference, and what the benchmark compares with.
    """

    def __init__(
        self,
        transformer: Transformer,
        requests: Sequence[GenerationRequest],
        *,
        layout: LayoutConfig,
        sampling: SamplingConfig,
        reuse_cache: bool = True,
    ) -> None:
        self.transformer, self.sampling, self.reuse_cache = transformer, sampling, reuse_cache
        self.device = transformer.token_embedding.weight.device
        self.jobs: list[_Job] = []
        documents: list[Document] = []
        self._ends: list[int] = []
        """For each row the end of its next window; for a start, the prompt."""
        for index, request in enumerate(requests):
            job = _Job(index, request, torch.Generator().manual_seed(request.seed), rows=[])
            for prompt in (request.segments, request.negative) if request.guidance else (request.segments,):
                job.rows.append(len(documents))
                documents.append(Document(segments=(*prompt, _continuation(request))))
                length = document_length(Document(segments=prompt), feed_last_scale=layout.feed_last_scale)
                self._ends.append(length + (request.task == "image"))  # <boi> belongs to the first window
            self.jobs.append(job)
        self.script = Script(documents, transformer.vocabulary, layout, self.device)
        self._starts = [0] * len(documents)
        self._rows = list(range(len(documents)))  # rows that are in the cache, in its order
        self.cache = self._new_cache()

    @property
    def active(self) -> bool:
        """Whether a request is unfinished."""
        return not all(job.finished for job in self.jobs)

    def step(self) -> list[_Job]:
        """Feed one window per row and draw what it predicts. Returns the requests that moved."""
        jobs = [job for job in self.jobs if not job.finished]
        self._drop_finished({row for job in jobs for row in job.rows})
        hidden_BND = self._feed({row for job in jobs for row in job.rows})
        groups: dict[tuple[str, int], list[_Job]] = {}
        for job in jobs:
            groups.setdefault((job.request.task, job.scale if job.request.task == "image" else 0), []).append(job)
        for (task, scale), group in groups.items():
            self._draw(task, scale, group, hidden_BND)
        return jobs

    def _feed(self, active: set[int]) -> Tensor:
        """Hidden states [B, N, D] of each row's window; rows that are not active add nothing."""
        if not self.reuse_cache:
            self.cache = self._new_cache()
        starts = [self._starts[row] if self.reuse_cache else 0 for row in self._rows]
        counts = [self._ends[row] - start if row in active else 0 for row, start in zip(self._rows, starts)]
        window = self.script.window(self._rows, starts, counts)
        self.cache.begin(window.block_BL, counts)
        x_BND = self.transformer.embed(window)
        return self.transformer.step(x_BND, window.position_3BL, self.cache)

    def _draw(self, task: str, scale: int, jobs: list[_Job], hidden_BND: Tensor) -> None:
        """Draw the codes of one scale, or one text id, of several requests, and open their next windows."""
        counts = [job.num_predicted for job in jobs]
        conditional_MV = self._logits(task, hidden_BND, [job.rows[0] for job in jobs], counts)
        logits_MV = conditional_MV
        t = [guidance_scale(job.request.guidance, scale, max(len(job.request.grids), 1)) for job in jobs]
        if any(t):
            # A request without guidance has one row, which then stands on both sides, with t = 0.
            unconditional_MV = self._logits(task, hidden_BND, [job.rows[-1] for job in jobs], counts)
            t_M = torch.tensor(t, device=self.device).repeat_interleave(torch.tensor(counts, device=self.device))
            logits_MV = guide(conditional_MV, unconditional_MV, t_M)
        if task == "text":
            # An answer has at least one id. Documents whose caption was dropped end behind their image, so the end is likely
            # there, and greedy captions would all be empty.
            first_M = torch.tensor([not job.drawn for job in jobs], device=self.device)
            logits_MV = logits_MV.clone()
            logits_MV[first_M, self.transformer.vocabulary.end_id] = -torch.inf
        noise_M = torch.cat([draw_noise(job.generator, count) for job, count in zip(jobs, counts)]).to(self.device)
        rule = self.sampling.of_scale(scale) if task == "image" else self.sampling.of_text()
        drawn = sample(logits_MV, noise_M, rule)
        logprob_M = conditional_MV.log_softmax(dim=-1).gather(1, drawn.index_M[:, None]).squeeze(1)
        (self._write_codes if task == "image" else self._write_ids)(jobs, counts, drawn.index_M)
        pieces = zip(*(values.cpu().split(counts) for values in (drawn.index_M, logprob_M, drawn.sampled_logprob_M)))
        for job, (index, logprob, sampled_logprob) in zip(jobs, pieces):
            job.drawn.append(index)
            job.logprobs.append(logprob)
            job.sampled_logprobs.append(sampled_logprob)
            self._advance(job, index)

    def _logits(self, task: str, hidden_BND: Tensor, rows: list[int], counts: list[int]) -> Tensor:
        """float32 logits [M, V] of codes or text ids at the predicted positions of `rows`. The other ids are never computed."""
        place = {row: index for index, row in enumerate(self._rows)}
        begins = [
            place[row] * hidden_BND.shape[1] + self._ends[row] - self._fed_from(row) - n for row, n in zip(rows, counts)
        ]
        flat_M = torch.cat([torch.arange(begin, begin + count) for begin, count in zip(begins, counts)]).to(self.device)
        vocabulary = self.transformer.vocabulary
        ids = slice(vocabulary.code_offset, None) if task == "image" else slice(0, vocabulary.text_size)
        hidden_MD = hidden_BND.flatten(0, 1)[flat_M]
        head = self.transformer.head
        if isinstance(head, torch.nn.Linear):  # one matrix for everything: take the rows of this kind
            return torch.nn.functional.linear(hidden_MD, head.weight[ids]).float()
        return (head.code(hidden_MD) if task == "image" else head.text(hidden_MD)[:, ids]).float()

    def _fed_from(self, row: int) -> int:
        return self._starts[row] if self.reuse_cache else 0

    def _write_codes(self, jobs: list[_Job], counts: list[int], code_M: Tensor) -> None:
        pieces = code_M.split(counts)
        for side in range(2):
            index, codes = [], []
            for job, piece in zip(jobs, pieces):
                if side < len(job.rows):
                    first = self.script.last_image_code[job.rows[side]] + sum(map(len, job.drawn))
                    index.append(torch.arange(first, first + len(piece)))
                    codes.append(piece)
            if index:
                self.script.write_codes(torch.cat(index).to(self.device), torch.cat(codes))

    def _write_ids(self, jobs: list[_Job], counts: list[int], id_M: Tensor) -> None:
        rows = torch.tensor([job.rows[0] for job in jobs], device=self.device)
        columns = torch.tensor([self._ends[job.rows[0]] for job in jobs], device=self.device)
        self.script.write_ids(rows, columns, id_M)

    def _advance(self, job: _Job, drawn: Tensor) -> None:
        """Open the next window behind the current one, or finish."""
        request = job.request
        if request.task == "image":
            job.scale += 1
            job.finished = job.scale == len(request.grids)
            job.num_predicted = 0 if job.finished else request.grids[job.scale][0] * request.grids[job.scale][1]
        else:
            ended = int(drawn[-1]) == self.transformer.vocabulary.end_id
            job.finished = ended or len(job.drawn) == request.max_text_tokens
        for row in job.rows:
            self._starts[row] = self._ends[row]
            self._ends[row] += 0 if job.finished else job.num_predicted

    def _drop_finished(self, active: set[int]) -> None:
        # Each drop copies the cache, so wait until it halves.
        if 2 * len(active) <= len(self._rows):
            kept = [place for place, row in enumerate(self._rows) if row in active]
            self.cache.keep(kept)
            self._rows = [self._rows[place] for place in kept]

    def _new_cache(self) -> KVCache:
        return KVCache(
            batch=len(self._rows),
            layers=self.transformer.config.num_layers,
            capacity=self.script.length,
            device=self.device,
        )


def _continuation(request: GenerationRequest) -> Segment:
    if request.task == "image":
        return ImageSegment(grids=request.grids)
    return TextSegment(ids=[0] * request.max_text_tokens)


def _results(jobs: list[_Job], end_id: int, tokenizer: Tokenizer | None) -> list[GenerationResult]:
    images = {} if tokenizer is None else _decode([job for job in jobs if job.request.task == "image"], tokenizer)
    results = []
    for job in jobs:
        drawn = torch.cat(job.drawn)
        is_image = job.request.task == "image"
        results.append(
            GenerationResult(
                index=job.index,
                request=job.request,
                codes=drawn if is_image else drawn[:0],
                text_ids=() if is_image else tuple(id for id in drawn.tolist() if id != end_id),
                logprobs=torch.cat(job.logprobs),
                sampled_logprobs=torch.cat(job.sampled_logprobs),
                num_scales=job.scale,
                finished=job.finished,
                image=images.get(job.index),
            )
        )
    return results


def _decode(jobs: list[_Job], tokenizer: Tokenizer) -> dict[int, Tensor]:
    """Pictures uint8 [H, W, 3] of the scales so far, those of the same grids together."""
    groups: dict[tuple, list[_Job]] = {}
    for job in jobs:
        groups.setdefault((job.request.grids, job.scale), []).append(job)
    images = {}
    for (grids, num_scales), group in groups.items():
        codes_BN = torch.stack([torch.cat(job.drawn) for job in group]).to(next(tokenizer.parameters()).device)
        image_BCHW = tokenizer.decode(codes_BN, grids, num_scales=num_scales)
        pixels_BHWC = ((image_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        images.update({job.index: pixels for job, pixels in zip(group, pixels_BHWC)})
    return images
