"""The whole system behind two calls: prompts of words and PIL pictures in, texts and PIL pictures out.

    pipeline = NextFlowPipeline.from_pretrained("folder")
    pipeline.generate("a red apple")[0].image                                            # text to image
    apples = [pipeline.request("a red apple", level=512, seed=seed) for seed in range(8)]
    pipeline.generate(apples)                                                            # one batch
    pipeline.generate(pipeline.request([photo, "make it night"]))[0].image               # editing
    pipeline.generate(pipeline.request([photo, "what is this?"], task="text"))[0].text
    pipeline.generate(pipeline.request("a story", task="interleaved", max_images=5))[0].parts
    pipeline.generate(pipeline.request("a hat", given=pipeline.outside(photo, mask)))    # inpainting
    for preview in pipeline.stream("a red apple"): preview.image                         # after each scale

A folder comes from `python main.py export` or `save_pretrained`. No lightning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextflow.generation.engine import generate, stream
from nextflow.generation.folder import System, read_folder, write_folder
from nextflow.generation.given import keep_outside, keep_scales
from nextflow.generation.requests import GenerationRequest, GenerationResult, Task
from nextflow.generation.sampling import Guidance, SamplingConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import ImageSegment, Segment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.pixels import as_rgb, fit_image
from nextflow.sequence.scales import Grid, ScaleSchedule
from nextflow.sequence.text_tokenizer import TextTokenizer

Prompt = str | Image.Image | Sequence[str | Image.Image]
"""Words, a picture, or several of both in reading order."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one prompt got."""

    parts: tuple[str | Image.Image, ...]
    """Texts and pictures in order."""
    result: GenerationResult
    """Codes, ids and log-probabilities behind it."""

    @property
    def image(self) -> Image.Image | None:
        """The last picture; of a preview, of the scales so far."""
        pictures = [part for part in self.parts if not isinstance(part, str)]
        return pictures[-1] if pictures else None

    @property
    def text(self) -> str:
        """All texts behind each other."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def finished(self) -> bool:
        """False for a preview."""
        return self.result.finished


class Given(NamedTuple):
    """What is kept of a picture."""

    codes_N: Tensor
    """int64, -1 where codes are drawn anew."""
    grids: tuple[Grid, ...]


class NextFlowPipeline:
    """A trained transformer with its two tokenizers.

    Args:
        transformer: in the dtype it should run in.
        tokenizer: the image tokenizer it was trained with.
        text_tokenizer: the text tokenizer it was trained with.
        layout: the layout it was trained with.
        sampling: how to draw, unless a call says otherwise.
        guidance: of pictures, unless a call says otherwise.
        levels: those of the pictures it was trained on; empty takes any of the schedule.
    """

    def __init__(
        self,
        *,
        transformer: Transformer,
        tokenizer: Tokenizer,
        text_tokenizer: TextTokenizer,
        layout: LayoutConfig,
        sampling: SamplingConfig | None = None,
        guidance: Guidance = 0.0,
        levels: tuple[int, ...] = (),
    ) -> None:
        self.transformer, self.tokenizer, self.text_tokenizer = transformer.eval(), tokenizer.eval(), text_tokenizer
        self.layout, self.sampling, self.guidance = layout, sampling or SamplingConfig(), guidance
        self.levels = levels or tuple(self.schedule.levels)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> NextFlowPipeline:
        """Load a folder of `save_pretrained`; never downloads. Raises as `folder.read_folder`."""
        system = read_folder(folder, dtype)
        return cls(**system._asdict()).to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything that `from_pretrained` needs, as safetensors in the layout of the Hugging Face hub."""
        write_folder(
            System(
                self.transformer,
                self.tokenizer,
                self.text_tokenizer,
                self.layout,
                self.sampling,
                self.guidance,
                self.levels,
            ),
            folder,
        )

    def to(self, device: torch.device | str) -> NextFlowPipeline:
        """Move to another device."""
        self.transformer.to(device)
        self.tokenizer.to(device)
        return self

    @property
    def schedule(self) -> ScaleSchedule:
        """Levels and aspect ratios that there are."""
        return self.tokenizer.schedule

    def generate(
        self,
        requests: str | GenerationRequest | Sequence[GenerationRequest],
        *,
        sampling: SamplingConfig | None = None,
        logprobs: bool = False,
    ) -> list[Answer]:
        """Answer requests as one batch, in their order.

        Args:
            requests: of `request`; they may differ in everything. Words alone ask for a picture of the highest level trained.
            sampling: how to draw; None takes the pipeline's own.
            logprobs: whether to also score what is drawn under the model itself.
        """
        results = generate(
            self.transformer,
            self._listed(requests),
            layout=self.layout,
            tokenizer=self.tokenizer,
            sampling=sampling or self.sampling,
            logprobs=logprobs,
        )
        return [self._answer(result) for result in results]

    def stream(
        self,
        requests: str | GenerationRequest | Sequence[GenerationRequest],
        *,
        sampling: SamplingConfig | None = None,
    ) -> Iterator[Answer]:
        """As `generate`, but yields each picture after each of its scales, and each answer at its end."""
        for result in stream(
            self.transformer,
            self._listed(requests),
            layout=self.layout,
            tokenizer=self.tokenizer,
            sampling=sampling or self.sampling,
        ):
            yield self._answer(result)

    def request(
        self,
        prompt: Prompt,
        *,
        task: Task = "image",
        level: int | None = None,
        aspect_ratio: float = 1.0,
        seed: int = 0,
        guidance: Guidance | None = None,
        negative: Prompt | None = None,
        max_text_tokens: int = 64,
        max_images: int = 1,
        given: Given | None = None,
    ) -> GenerationRequest:
        """A prompt and what should follow it.

        Args:
            prompt: words, a picture, or several of both.
            task: "image", "text", "reasoning" (a text, then a picture) or "interleaved".
            level: of the pictures, the prompt's included; None is the highest that was trained.
            aspect_ratio: height / width of generated pictures.
            seed: of this request's random numbers.
            guidance: see `GenerationRequest`; None takes the pipeline's own.
            negative: prompt of the unconditional side.
            max_text_tokens: longest run of text ids.
            max_images: most pictures of an interleaved answer.
            given: what is kept of a picture (`coarse`, `outside`), whose level and ratio the answer then has.

        Raises ValueError for a level, ratio or value that there is not.
        """
        level = max(self.levels) if level is None else level
        draws = task != "text"
        if draws and level in self.schedule.levels and level not in self.levels:
            raise ValueError(
                f"this transformer was trained at level {', '.join(map(str, self.levels))} alone: ask for one of these, "
                f"not for level {level}"
            )
        grids = self.schedule.grids(level, aspect_ratio) if given is None else given.grids
        return GenerationRequest(
            segments=self.segments(prompt, level),
            task=task,
            grids=grids if draws else (),
            seed=seed,
            guidance=(self.guidance if guidance is None else guidance) if draws else 0.0,
            negative=None if negative is None else self.segments(negative, level),
            max_text_tokens=max_text_tokens,
            max_images=max_images,
            given=None if given is None else given.codes_N,
        )

    def coarse(self, picture: Image.Image, num_scales: int, level: int | None = None) -> Given:
        """Keep the first `num_scales` scales of a picture: the layout stays, the details vary."""
        segment = self.encode(picture, max(self.levels) if level is None else level)
        assert segment.codes is not None
        return Given(keep_scales(segment.codes, segment.grids, num_scales), segment.grids)

    def outside(self, picture: Image.Image, mask: Image.Image, level: int | None = None) -> Given:
        """Keep a picture where `mask`, of its size, is black: what is white is drawn anew.

        Raises ValueError when the sizes differ, or the mask fills no cell.
        """
        if mask.size != picture.size:
            raise ValueError(f"the mask is {mask.size}, the picture {picture.size} (width, height): they must be equal")
        segment = self.encode(picture, max(self.levels) if level is None else level)
        assert segment.codes is not None
        height, width = segment.grids[-1]
        pixels = (height * self.schedule.stride, width * self.schedule.stride)
        mask_HW = fit_image(mask.convert("RGB"), pixels)[0] > 127  # cut as the picture is
        return Given(keep_outside(segment.codes, segment.grids, mask_HW), segment.grids)

    def segments(self, prompt: Prompt, level: int) -> tuple[Segment, ...]:
        """A prompt as texts and codes. Empty texts are left out."""
        parts = [prompt] if isinstance(prompt, (str, Image.Image)) else list(prompt)
        segments: list[Segment] = []
        for part in parts:
            if isinstance(part, Image.Image):
                segments.append(self.encode(part, level))
            elif ids := self.text_tokenizer.encode(part):
                segments.append(TextSegment(ids=ids))
        return tuple(segments)

    @torch.no_grad()
    def encode(self, picture: Image.Image, level: int) -> ImageSegment:
        """A picture as codes, cut to the nearest aspect ratio of the schedule."""
        ratio = picture.height / picture.width
        grids = self.schedule.grids(level, ratio)
        pixels_CHW = fit_image(as_rgb(picture), self.schedule.pixels(level, ratio))
        device = next(self.tokenizer.parameters()).device
        image_BCHW = pixels_CHW[None].to(device).float() / 127.5 - 1
        return ImageSegment(grids=grids, codes=self.tokenizer.encode(image_BCHW, grids).target_codes_BN[0].cpu())

    def _listed(self, requests: str | GenerationRequest | Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        if isinstance(requests, str):
            return [self.request(requests)]
        return [requests] if isinstance(requests, GenerationRequest) else requests

    def _answer(self, result: GenerationResult) -> Answer:
        images = [Image.fromarray(np.asarray(image)) for image in result.images]
        parts: list[str | Image.Image] = []
        for segment in result.segments:
            if isinstance(segment, TextSegment):
                parts.append(self.text_tokenizer.decode(segment.ids))
            else:
                parts.append(images.pop(0))
        return Answer(parts=(*parts, *images), result=result)
