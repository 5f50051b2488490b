"""What rewards are shown of answers, and what callbacks see of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from nextflow.generation.requests import GenerationResult
from nextflow.sequence.text_tokenizer import TextTokenizer


class ScoredRollouts(NamedTuple):
    """Pictures of a batch and what they were worth."""

    prompts: list[str]
    """The prompt of each picture; those of a group stand behind each other."""
    images: list[Tensor]
    """uint8 [H, W, 3]."""
    rewards: Tensor
    num_generations: int


class Shown(NamedTuple):
    """The arguments of a reward (`rewards.reward.Reward`)."""

    images: list[Tensor]
    prompts: list[str]
    metadata: list[Mapping[str, Any]]


def shown_to_rewards(
    prompts: Sequence[Any], results: Sequence[GenerationResult], text_tokenizer: TextTokenizer
) -> Shown:
    """Pictures, the text of their prompts, and what is known of each.

    Args:
        prompts: of a PromptBatch, one for each result.
        results: with pictures.
        text_tokenizer: reads what was written in front of a picture.

    Raises:
        ValueError: a prompt asks for no picture.
    """
    images: list[Tensor] = []
    metadata: list[Mapping[str, Any]] = []
    for prompt, result in zip(prompts, results):
        if result.image is None:
            raise ValueError(
                f"rewards score pictures, and the prompt {prompt.text!r} of task {prompt.task!r} gets none: "
                "set data.task to image or reasoning"
            )
        images.append(result.image.permute(2, 0, 1).contiguous())
        sources = [segment.pixels_CHW.cpu() for segment in prompt.segments if hasattr(segment, "pixels_CHW")]
        known = {"sources": sources, "reference": prompt.reference, "text": text_tokenizer.decode(result.text_ids)}
        # A sample's own "source" and "target" of an edit keep their names beside these.
        metadata.append({**prompt.metadata, **known})
    return Shown(images, [prompt.text for prompt in prompts], metadata)
