"""One request while it is decoded: what it has, what it draws next, and what follows from a draw.

A job draws a text id or the codes of one scale at a time. Its rows are the conditional one and, with guidance, the
unconditional one, which is fed the same pictures but no text that the model writes.

Shapes: N codes of a picture over all scales, M positions of one scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nextflow.generation.requests import GenerationRequest, GenerationResult
from nextflow.generation.rows import Row
from nextflow.sequence.documents import ImageSegment, Segment, TextSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import UNKNOWN_CODE
from nextflow.sequence.scales import num_codes_of


class Allowed(NamedTuple):
    """What a text position may draw."""

    text: bool
    boi: bool
    end: bool


class Job:
    """A request under way.

    Args:
        index: its place in the list.
        request: what is asked for.
        vocabulary: ids of the transformer.
        layout: the layout that it was trained with.
        device: where codes are kept.
    """

    def __init__(
        self, index: int, request: GenerationRequest, vocabulary: Vocabulary, layout: LayoutConfig, device: torch.device
    ) -> None:
        self.index, self.request, self.vocabulary = index, request, vocabulary
        self.device = device
        self.generator = torch.Generator().manual_seed(request.seed)
        self.rows = [Row(vocabulary, layout)]
        prompts = [request.segments]
        if request.guided:
            self.rows.append(Row(vocabulary, layout))
            prompts.append(request.unconditional)
        for row, prompt in zip(self.rows, prompts):
            for segment in prompt:
                row.write_segment(segment)
        self.scale: int | None = None
        """Scale that is drawn next, from 0; None when a text id is."""
        self.pictures: list[Tensor] = []
        """Codes [N] of each picture; the last one may be under way."""
        self.images: list[Tensor] = []
        """Complete pictures that were decoded already."""
        self.finished = self.ended = False
        self.is_action: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.sampled_logprobs: list[Tensor] = []
        self._segments: list[Segment] = []
        self._ids: list[int] = []
        if request.task == "image":
            self.is_action.append(torch.tensor([False]))  # <boi> is put
            self._begin_picture()

    @property
    def grids(self):
        """Grids of its pictures."""
        return self.request.grids

    @property
    def num_drawn(self) -> int:
        """Positions that the next draw predicts from."""
        return 1 if self.scale is None else self.grids[self.scale][0] * self.grids[self.scale][1]

    @property
    def num_scales(self) -> int:
        """Scales of the last picture that are done."""
        if not self.pictures:
            return 0
        return len(self.grids) if self.scale is None else self.scale

    def allowed(self) -> Allowed:
        """What the next text position may draw."""
        request = self.request
        # An answer is never empty. Documents whose caption was dropped end behind their image, so that the end is likely
        # there, and greedy captions would all be empty.
        begun = bool(self._segments or self._ids)
        text = len(self._ids) < request.max_text_tokens
        if request.task == "text":
            return Allowed(text, False, begun)
        if request.task == "reasoning":
            return Allowed(text, True, False)
        return Allowed(text, len(self.pictures) < request.max_images, begun)

    def take_id(self, id: int, is_action: bool) -> None:
        """A text position drew `id`."""
        self.is_action.append(torch.tensor([is_action]))
        if id == self.vocabulary.end_id:
            self._end_text()
            self.finished = self.ended = True
        elif id == self.vocabulary.boi:
            self._end_text()
            self._begin_picture()
        else:
            self._ids.append(id)
            self.rows[0].write_ids([id])
            allowed = self.allowed()
            if not allowed.text and not allowed.boi:
                self._end_text()
                self.finished = True

    def given_here(self) -> Tensor | None:
        """Codes of the current scale that are given, UNKNOWN_CODE where they are not; None where all are drawn."""
        if self.request.given is None or len(self.pictures) > 1:
            return None
        assert self.scale is not None
        first = num_codes_of(self.grids[: self.scale])
        return self.request.given[first : first + self.num_drawn]

    def take_codes(self, code_M: Tensor) -> None:
        """The current scale drew these codes, given ones included."""
        assert self.scale is not None
        first = num_codes_of(self.grids[: self.scale])
        self.pictures[-1][first : first + len(code_M)] = code_M
        given_M = self.given_here()
        self.is_action.append(torch.ones(len(code_M), dtype=torch.bool) if given_M is None else given_M == UNKNOWN_CODE)
        self.scale += 1
        if self.scale < len(self.grids):
            self._write_scales(self.scale)
            return
        self.scale = None
        self._segments.append(ImageSegment(grids=self.grids, codes=self.pictures[-1]))
        if self.request.task in ("image", "reasoning"):
            self.finished = True
        else:
            for row in self.rows:
                row.close_picture(self.grids, self.pictures[-1])

    def result(self, images: tuple[Tensor, ...]) -> GenerationResult:
        """What there is so far."""
        codes_N = self.pictures[-1][: num_codes_of(self.grids[: self.num_scales])] if self.pictures else torch.zeros(0)
        return GenerationResult(
            index=self.index,
            request=self.request,
            segments=tuple(
                ImageSegment(grids=part.grids, codes=part.codes.cpu())
                if isinstance(part, ImageSegment) and part.codes is not None
                else part
                for part in self._segments
            ),
            codes=codes_N.to("cpu", torch.int64, copy=True),
            num_scales=self.num_scales,
            ended=self.ended,
            is_action=torch.cat(self.is_action) if self.is_action else torch.zeros(0, dtype=torch.bool),
            sampled_logprobs=_joined(self.sampled_logprobs),
            logprobs=_joined(self.logprobs) if self.logprobs else None,
            finished=self.finished,
            images=images,
        )

    def _end_text(self) -> None:
        if self._ids:
            self._segments.append(TextSegment(ids=tuple(self._ids)))
        self._ids = []

    def _begin_picture(self) -> None:
        given_N, kept = self.request.given, 0
        if given_N is not None and not self.pictures:
            # Leading scales that are given whole are written at once.
            while bool((given_N[: num_codes_of(self.grids[: kept + 1])] != UNKNOWN_CODE).all()):
                kept += 1
            codes_N = given_N.clamp(min=0).to(self.device, copy=True)
        else:
            codes_N = torch.zeros(num_codes_of(self.grids), dtype=torch.int64, device=self.device)
        self.is_action.append(torch.zeros(num_codes_of(self.grids[:kept]), dtype=torch.bool))
        self.pictures.append(codes_N)
        self.scale = kept
        for row in self.rows:
            row.open_picture()
        self._write_scales(0)

    def _write_scales(self, first: int) -> None:
        """Write the blocks `first` to the current one."""
        assert self.scale is not None
        for row in self.rows:
            row.write_scales(self.grids, self.pictures[-1], first, self.scale + 1)


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat([piece.cpu() for piece in pieces]) if pieces else torch.zeros(0)
