"""What generation is asked for and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nextflow.sequence.documents import ImageSegment, Segment
from nextflow.sequence.scales import Grid, num_codes_of

Task = Literal["image", "text"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and what should follow it: an image or a text."""

    segments: tuple[Segment, ...] = ()
    """The prompt: texts and images (with codes) in reading order. Empty asks for an unconditional sample."""
    task: Task = "image"
    """What is generated behind the prompt."""
    grids: tuple[Grid, ...] = ()
    """Grids of the image's scales, coarse to fine; image task only."""
    seed: int = 0
    """Seed of this request's random numbers. The sample does not depend on the rest of the batch."""
    guidance: float = 0.0
    """Guidance at the last scale (`sampling.guidance_scale`); 0 turns it off. Image task only."""
    negative: tuple[Segment, ...] = ()
    """Prompt of the unconditional side of guidance; empty is the dropped caption of training."""
    max_text_tokens: int = 64
    """Longest text; text task only."""

    def __post_init__(self) -> None:
        if self.task == "image" and not self.grids:
            raise ValueError(
                "a request of task 'image' needs `grids`: take them from ScaleSchedule.grids(level, aspect_ratio)"
            )
        if self.task == "text" and (self.guidance or self.negative):
            raise ValueError(
                "guidance applies to images: a request of task 'text' needs guidance 0 and no negative prompt"
            )
        if self.task == "text" and self.max_text_tokens < 1:
            raise ValueError(f"max_text_tokens must be at least 1, got {self.max_text_tokens}")
        if self.negative and not self.guidance:
            raise ValueError("a negative prompt needs guidance above 0")
        if self.guidance < 0:
            raise ValueError(f"guidance must be at least 0, got {self.guidance}")
        for segment in (*self.segments, *self.negative):
            if isinstance(segment, ImageSegment) and segment.codes is None:
                raise ValueError("an image of the prompt has no codes: encode it with the tokenizer first")


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What one request has given so far; everything is on the CPU."""

    index: int
    """Place of the request in the list that was asked for."""
    request: GenerationRequest
    codes: Tensor
    """int64 [N], codes of the scales so far, each scale row-major; empty for texts."""
    text_ids: tuple[int, ...]
    """Text ids without the end; empty for images."""
    logprobs: Tensor
    """float32, one per code or text id, and one for the end when the text ended by itself: log-probability under the model
    itself: conditional, no guidance, temperature 1, among the ids of its kind (codes, or text ids). A learner recomputes it."""
    sampled_logprobs: Tensor
    """float32, the same ids in the distribution they were drawn from, guidance, temperature, top-k and top-p applied."""
    num_scales: int
    """Scales of the image that are done."""
    finished: bool
    """False for previews."""
    image: Tensor | None = None
    """uint8 [H, W, 3], when a tokenizer was given; of the scales so far."""

    @property
    def done_grids(self) -> tuple[Grid, ...]:
        """Grids of the scales that are done; `codes` holds exactly their codes."""
        assert num_codes_of(self.request.grids[: self.num_scales]) == len(self.codes)
        return self.request.grids[: self.num_scales]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """One line of `predict`: what `callbacks.writers` reads, by attribute, to write files."""

    index: int
    """Number of the prompt over the whole run: names the file."""
    prompt: str
    """The prompt as text; for the text task the reference text, empty when there is none."""
    seed: int = 0
    level: int = 0
    aspect_ratio: float = 1.0
    """height / width"""
    key: str = ""
    """Key of the source drawing, empty for free prompts."""
    split: str = ""
    """Split of the source drawing."""
    image: Tensor | None = None
    """uint8 [H, W, 3] on the CPU; None for the text task."""
    text: str | None = None
    """The generated text; None for the image task."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Generated:
        """The same: results are on the CPU already, which is where Lightning moves predictions."""
        return self
