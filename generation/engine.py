"""Generation: texts id by id and pictures scale by scale, any mix of both in one batch (NextFlow 2.2).

A step feeds one window per row and draws what it predicts: first every prompt, then one text id or one scale. Requests that
write text go first and wait at `<boi>`; then pictures are drawn, those at the same scale together, whatever their ratio. Equal
prompts of a batch (a group of roll-outs, the unconditional side of guidance) are fed once and their keys and values copied.
Guidance is one more row per request. Finished rows take no part, and leave the cache once they are half of it.

Text positions draw text ids, `<boi>` and the end, as the request allows; picture positions draw codes.

Shapes: R rows of a step, N positions of the longest window, M predicted positions, D width, V ids of one kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nextflow.generation.cache import KVCache
from nextflow.generation.drawing import Fed, draw_codes, draw_ids
from nextflow.generation.job import Job
from nextflow.generation.requests import Generated, GenerationRequest, GenerationResult
from nextflow.generation.rows import Row, Window
from nextflow.generation.sampling import SamplingConfig
from nextflow.sequence.documents import ImageSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.scales import Grid, num_codes_of

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
    logprobs: bool = False,
) -> list[GenerationResult]:
    """Answer all requests as one batch, in their order.

    Args:
        transformer: the model; its device and precision (autocast) are used.
        requests: prompts; texts as ids, images as codes.
        layout: the layout that the transformer was trained with.
        tokenizer: decodes the codes to pictures; None leaves `GenerationResult.images` empty.
        sampling: temperature, top-k, top-p; the default draws from the model's own distribution.
        logprobs: whether to also score what is drawn under the model itself (`GenerationResult.logprobs`).
    """
    if not requests:
        return []
    decoding = Decoding(transformer, requests, layout=layout, sampling=sampling or SamplingConfig(), logprobs=logprobs)
    while decoding.active:
        decoding.step()
    return _results(decoding.jobs, tokenizer)


@torch.no_grad()
def stream(
    transformer: Transformer,
    requests: Sequence[GenerationRequest],
    *,
    layout: LayoutConfig,
    tokenizer: Tokenizer | None = None,
    sampling: SamplingConfig | None = None,
    logprobs: bool = False,
) -> Iterator[GenerationResult]:
    """As `generate`, but yields a result for every picture after each of its scales, and for every answer at its end.

    Results with `finished` False are previews: their last image is decoded from the scales so far.
    """
    if not requests:
        return
    decoding = Decoding(transformer, requests, layout=layout, sampling=sampling or SamplingConfig(), logprobs=logprobs)
    while decoding.active:
        moved = decoding.step()
        yield from _results([job for job in moved if job.num_scales or job.finished], tokenizer)


class Decoding:
    """The state of one batch: `step` moves some unfinished requests by one scale or one text id."""

    def __init__(
        self,
        transformer: Transformer,
        requests: Sequence[GenerationRequest],
        *,
        layout: LayoutConfig,
        sampling: SamplingConfig,
        logprobs: bool = False,
    ) -> None:
        self.transformer, self.sampling, self.logprobs = transformer, sampling, logprobs
        self.device = transformer.token_embedding.weight.device
        _check_scales(requests, transformer.config.max_scales)
        vocabulary = transformer.vocabulary
        self.jobs = [Job(index, request, vocabulary, layout, self.device) for index, request in enumerate(requests)]
        self.cache: KVCache | None = None
        self._rows = [row for job in self.jobs for row in job.rows]  # in the order of the cache

    @property
    def active(self) -> bool:
        """Whether a request is unfinished."""
        return not all(job.finished for job in self.jobs)

    def step(self) -> list[Job]:
        """Feed one window of each row whose turn it is and draw what it predicts. Returns the requests that moved."""
        jobs = self._next()
        rows = [row for job in jobs for row in job.rows if row.pending]
        fed = self._prefill(rows) if self.cache is None else self._feed(rows)
        groups: dict[int | None, list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.scale, []).append(job)
        for scale, group in groups.items():
            draw = draw_ids if scale is None else draw_codes
            draw(self.transformer, group, fed, self.sampling, self.logprobs)
        return jobs

    def _next(self) -> list[Job]:
        """Whose turn it is: everyone at first; then those that write text, then those at the coarsest scale."""
        jobs = [job for job in self.jobs if not job.finished]
        if self.cache is None:
            return jobs
        texts = [job for job in jobs if job.scale is None]
        coarsest = min((job.scale for job in jobs if job.scale is not None), default=None)
        return texts or [job for job in jobs if job.scale == coarsest]

    def _prefill(self, rows: list[Row]) -> Fed:
        """Feed the prompts, each of several equal ones once."""
        first: dict[tuple, int] = {}
        source = [first.setdefault(row.key(), len(first)) for row in rows]
        unique = [rows[source.index(place)] for place in range(len(first))]
        self.cache = KVCache(
            batch=len(unique),
            layers=self.transformer.config.num_layers,
            capacity=max(map(_expected_length, self.jobs)),
            device=self.device,
        )
        window = Window.take(unique, self.device)
        hidden_RND = self._forward(window, None)
        for row in rows:
            row.pending = []
        if len(unique) < len(rows):
            self.cache.select(source)
        return Fed(hidden_RND, dict(zip(rows, source)), window.counts)

    def _feed(self, rows: list[Row]) -> Fed:
        active = {row for job in self.jobs if not job.finished for row in job.rows}
        if 2 * len(active) <= len(self._rows):  # each drop copies the cache, so wait until it halves
            kept = [place for place, row in enumerate(self._rows) if row in active]
            assert self.cache is not None
            self.cache.select(kept)
            self._rows = [self._rows[place] for place in kept]
        place = {row: index for index, row in enumerate(self._rows)}
        window = Window.take(rows, self.device)
        hidden_RND = self._forward(window, [place[row] for row in rows])
        return Fed(hidden_RND, {row: index for index, row in enumerate(rows)}, window.counts)

    def _forward(self, window: Window, rows: list[int] | None) -> Tensor:
        """Hidden states [R, N, D] of a window."""
        assert self.cache is not None
        self.cache.begin(window.block_BL, window.counts, rows)
        return self.transformer.step(self.transformer.embed(window), window.position_3BL, self.cache)


def _expected_length(job: Job) -> int:
    """Positions that its longer row will have, as far as they can be told."""
    request = job.request
    picture = 0 if request.task == "text" else num_codes_of(request.grids) + 1
    text = 0 if request.task == "image" else request.max_text_tokens
    return max(row.num_pending for row in job.rows) + text + picture


def _check_scales(requests: Sequence[GenerationRequest], max_scales: int) -> None:
    pictures = [request.grids for request in requests]
    pictures += [part.grids for request in requests for part in request.segments if isinstance(part, ImageSegment)]
    most = max(map(len, pictures), default=0)
    if most > max_scales:
        raise ValueError(
            f"a picture has {most} scales, but this transformer knows at most {max_scales} (transformer.max_scales): "
            "ask for a lower level"
        )


def _results(jobs: list[Job], tokenizer: Tokenizer | None) -> list[GenerationResult]:
    """Results of the jobs; their pictures are decoded, complete ones once."""
    if tokenizer is None:
        return [job.result(()) for job in jobs]
    results = []
    for job in jobs:
        images = [*job.images]
        for number in range(len(images), len(job.pictures)):
            under_way = job.scale is not None and number == len(job.pictures) - 1
            num_scales = job.num_scales if under_way else len(job.grids)
            if num_scales:
                # One by one: rounding depends on the size of a batch, and a picture is not to depend on the others.
                code_1N = job.pictures[number][None, : num_codes_of(job.grids[:num_scales])]
                images.append(decode_pixels(tokenizer, code_1N, job.grids, num_scales)[0])
        job.images = images[: len(job.pictures) - (job.scale is not None)]
        results.append(job.result(tuple(images)))
    return results


def decode_pixels(tokenizer: Tokenizer, codes_BN: Tensor, grids: tuple[Grid, ...], num_scales: int) -> Tensor:
    """Pictures uint8 [B, H, W, 3] on the CPU of the codes of the first `num_scales` scales."""
    device = next(tokenizer.parameters()).device
    image_BCHW = tokenizer.decode(codes_BN.to(device), grids, num_scales=num_scales)
    return ((image_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
