"""From prompts to requests for the generation engine, and from its results to what `predict` writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nextflow.generation.requests import Generated, GenerationRequest, GenerationResult
from nextflow.sequence.documents import ImageSegment, Segment, TextSegment
from nextflow.sequence.scales import Grid, ScaleSchedule
from nextflow.sequence.text_tokenizer import TextTokenizer

Encode = Callable[[Sequence[Tensor], Sequence[tuple[Grid, ...]]], list[Tensor]]
"""uint8 images and their grids -> codes [N] of each."""


def request_of(
    prompt: Any, *, schedule: ScaleSchedule, encode: Encode, guidance: float, max_text_tokens: int, max_images: int = 1
) -> GenerationRequest:
    """The request that answers a prompt; its pictures are encoded.

    Args:
        prompt: of a PromptBatch.
        schedule: gives the grids of the prompt's level and aspect ratio.
        encode: codes of the prompt's pictures.
        guidance: at the last scale of images; texts have none.
        max_text_tokens: longest text.
        max_images: most pictures of an interleaved answer.
    """
    segments: list[Segment] = []
    for segment in prompt.segments:
        if isinstance(segment, (TextSegment, ImageSegment)):
            segments.append(segment)
        else:  # pixels
            (code_N,) = encode([segment.pixels_CHW], [segment.grids])
            segments.append(ImageSegment(grids=segment.grids, codes=code_N.cpu()))
    draws = prompt.task != "text"
    return GenerationRequest(
        segments=tuple(segments),
        task=prompt.task,
        grids=schedule.grids(prompt.level, prompt.aspect_ratio) if draws else (),
        seed=prompt.seed,
        guidance=guidance if draws else 0.0,
        max_text_tokens=max_text_tokens,
        max_images=max_images,
    )


def generated_of(prompt: Any, result: GenerationResult, text_tokenizer: TextTokenizer) -> Generated:
    """What writers read of a prompt and its answer."""
    images = iter(result.images)
    return Generated(
        index=prompt.index,
        prompt=prompt.text,
        seed=prompt.seed,
        level=prompt.level,
        aspect_ratio=prompt.aspect_ratio,
        key=prompt.key,
        split=prompt.split,
        image=result.image,
        text=text_tokenizer.decode(result.text_ids) if prompt.task != "image" else None,
        parts=tuple(
            text_tokenizer.decode(segment.ids) if isinstance(segment, TextSegment) else next(images)
            for segment in (result.segments if result.images or prompt.task == "text" else ())
        ),
    )
