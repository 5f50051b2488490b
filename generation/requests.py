"""What generation is asked for and what it gives back.

    image           one picture
    text            a text, until its end
    reasoning       a text (a thought, a refined prompt), then one picture
    interleaved     texts and pictures in turn, until the end: a story, a dialogue, an example to complete

Editing is task "image" with source pictures and an instruction in the prompt; in-context editing has example pairs in front.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nextflow.generation.sampling import Guidance
from nextflow.sequence.documents import Document, ImageSegment, Segment, TextSegment
from nextflow.sequence.layout import UNKNOWN_CODE
from nextflow.sequence.scales import Grid, num_codes_of

Task = Literal["image", "text", "reasoning", "interleaved"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and what should follow it."""

    segments: tuple[Segment, ...] = ()
    """The prompt: texts and images (with codes) in reading order. Empty asks for an unconditional sample."""
    task: Task = "image"
    """What is generated behind the prompt."""
    grids: tuple[Grid, ...] = ()
    """Grids of the scales of every generated picture, coarse to fine: `ScaleSchedule.grids(level, aspect_ratio)`."""
    seed: int = 0
    """Seed of this request's random numbers. The sample does not depend on the rest of the batch."""
    guidance: Guidance = 0.0
    """Guidance of pictures: a number is that of the last scale, reached linearly from 0 at the first; a tuple gives that of
    each scale, its last value for all later ones. 0 turns it off."""
    negative: tuple[Segment, ...] | None = None
    """Prompt of the unconditional side of guidance; None is the prompt without its texts, as training drops them."""
    max_text_tokens: int = 64
    """Longest run of text ids. A text ends there; in front of a picture that is still due, the picture begins there."""
    max_images: int = 1
    """Most pictures of an interleaved answer."""
    given: Tensor | None = None
    """int64 [N], codes of the first picture that are kept, UNKNOWN_CODE (-1) where it is drawn (`generation.given` makes it):
    coarse scales to vary the details of, or everything outside a mask."""

    def __post_init__(self) -> None:
        draws = self.task != "text"
        if draws and not self.grids:
            raise ValueError(
                f"a request of task {self.task!r} needs `grids`: take them from ScaleSchedule.grids(level, aspect_ratio)"
            )
        if not draws and (self.guided or self.negative is not None or self.given is not None):
            raise ValueError("guidance, a negative prompt and given codes apply to pictures; task 'text' has none")
        if self.task != "image" and self.max_text_tokens < 1:
            raise ValueError(f"max_text_tokens must be at least 1, got {self.max_text_tokens}")
        if self.max_images < 1:
            raise ValueError(f"max_images must be at least 1, got {self.max_images}; task 'text' draws none")
        if self.negative is not None and not self.guided:
            raise ValueError("a negative prompt needs guidance above 0")
        values = self.guidance if isinstance(self.guidance, tuple) else (self.guidance,)
        if not values or min(values) < 0:
            raise ValueError(f"guidance must be at least 0, or a tuple of such numbers, got {self.guidance}")
        for segment in (*self.segments, *(self.negative or ())):
            if isinstance(segment, ImageSegment) and segment.codes is None:
                raise ValueError("an image of the prompt has no codes: encode it with the tokenizer first")
        if self.given is not None:
            _check_given(self.given, num_codes_of(self.grids))

    @property
    def guided(self) -> bool:
        """Whether pictures need the unconditional side."""
        return any(self.guidance) if isinstance(self.guidance, tuple) else self.guidance > 0

    @property
    def unconditional(self) -> tuple[Segment, ...]:
        """Prompt of the unconditional side."""
        if self.negative is not None:
            return self.negative
        return tuple(segment for segment in self.segments if isinstance(segment, ImageSegment))


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What one request has given so far; everything is on the CPU.

    An action is what was drawn: a text id, `<boi>`, the end, a code. What was given or could not be otherwise is none.
    """

    index: int
    """Place of the request in the list that was asked for."""
    request: GenerationRequest
    segments: tuple[Segment, ...]
    """Texts and complete pictures, in order."""
    codes: Tensor
    """int64 [N], codes of the last picture's scales so far, each scale row-major; empty where there is none."""
    num_scales: int
    """Scales of the last picture that are done."""
    ended: bool
    """Whether the end was drawn."""
    is_action: Tensor
    """bool, for every id of the answer in order (texts, `<boi>`, codes, a drawn end), whether it is an action."""
    sampled_logprobs: Tensor
    """float32 [A], log-probability of each action in the distribution it was drawn from: guidance, temperature, top-k and top-p
    applied, among the ids that could be drawn there; 0 when greedy."""
    logprobs: Tensor | None
    """float32 [A], under the model itself: conditional, no guidance, temperature 1, as `Transformer.cross_entropy` gives them
    to a learner (`generation.rollouts`). None unless they were asked for."""
    finished: bool
    """False for previews."""
    images: tuple[Tensor, ...] = ()
    """uint8 [H, W, 3] of every picture, when a tokenizer was given; the last may be a preview, of the scales so far."""

    @property
    def image(self) -> Tensor | None:
        """The last picture."""
        return self.images[-1] if self.images else None

    @property
    def text_ids(self) -> tuple[int, ...]:
        """Ids of all texts behind each other, without the end."""
        return tuple(id for segment in self.segments if isinstance(segment, TextSegment) for id in segment.ids)

    @property
    def done_grids(self) -> tuple[Grid, ...]:
        """Grids of the last picture's scales that are done; `codes` holds exactly their codes."""
        return self.request.grids[: self.num_scales]

    @property
    def document(self) -> Document:
        """Prompt, without loss, and answer: what a learner is fed."""
        prompt = tuple(replace(segment, loss=False) for segment in self.request.segments)
        return Document(segments=(*prompt, *self.segments))


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
    """uint8 [H, W, 3] on the CPU, the last picture; None where there is none."""
    text: str | None = None
    """All generated text; None for task "image"."""
    parts: tuple[str | Tensor, ...] = ()
    """Texts and pictures (uint8 [H, W, 3]) of the answer in order."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Generated:
        """The same: results are on the CPU already, which is where Lightning moves predictions."""
        return self


def _check_given(given: Tensor, num_codes: int) -> None:
    if given.shape != (num_codes,):
        raise ValueError(f"`given` has shape {tuple(given.shape)}, but the picture's grids hold {num_codes} codes")
    if not bool((given == UNKNOWN_CODE).any()):
        raise ValueError("`given` leaves nothing to draw: set codes to -1 where the picture should be drawn anew")
