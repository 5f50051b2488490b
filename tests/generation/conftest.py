"""A tiny transformer with strong random weights, so that mistakes of position, mask or guidance show in its logits."""

from __future__ import annotations

import pytest
import torch

from nextflow.generation.requests import GenerationRequest
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import ImageSegment, TextSegment
from nextflow.sequence.scales import ScaleSchedule, num_codes_of


class Studio:
    """What prompts are made of."""

    schedule = ScaleSchedule(
        sides=(1, 2, 3, 4, 5, 6, 8), levels={32: 4, 64: 7}, stride=8, base_grids=((6, 11), (8, 8), (11, 6))
    )
    text_size, codes = 20, 24

    def transformer(self, head: str = "single") -> Transformer:
        torch.manual_seed(0)
        config = TransformerConfig(
            text_size=self.text_size, codebook_size=self.codes, start_id=0, end_id=1, code_dim=6, width=32,
            num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=48, rope_sections=(2, 3, 3), head=head,
            init_std=0.2,
        )  # fmt: skip
        return Transformer(config).eval()

    def text(self, *ids: int) -> TextSegment:
        return TextSegment(ids=list(ids))

    def picture(self, level: int, ratio: float = 1.0, seed: int = 0) -> ImageSegment:
        grids = self.schedule.grids(level, ratio)
        generator = torch.Generator().manual_seed(seed)
        return ImageSegment(
            grids=grids, codes=torch.randint(0, self.codes, (num_codes_of(grids),), generator=generator)
        )

    def requests(self) -> list[GenerationRequest]:
        """Every task; prompts of many lengths, both levels, square, wide and tall; guidance, negative prompts, given codes."""
        text, picture = self.text, self.picture
        square, wide, tall, small = (self.schedule.grids(*key) for key in ((64, 1.0), (64, 0.55), (64, 1.8), (32, 1.0)))
        painted = picture(64, seed=5).codes.clone()
        painted[torch.rand(len(painted), generator=torch.Generator().manual_seed(1)) < 0.4] = -1
        coarse = picture(32, seed=6).codes.clone()
        coarse[num_codes_of(small[:2]) :] = -1
        pair = (picture(32, 0.55, 7), picture(32, 1.8, 8))
        return [
            GenerationRequest(segments=(text(5, 6, 7),), grids=square, seed=1, guidance=3.0),
            GenerationRequest(segments=(text(8),), grids=wide, seed=2),
            GenerationRequest(
                segments=(text(*range(4, 15)),), grids=small, seed=3, guidance=1.5, negative=(text(3, 4),)
            ),
            GenerationRequest(grids=tall, seed=4),
            # Editing: one source, two sources, an example pair in front.
            GenerationRequest(segments=(picture(32, 0.55), text(9, 2)), grids=tall, seed=5, guidance=2.0),
            GenerationRequest(segments=(picture(64), picture(32, 1.0, 2), text(9)), grids=wide, seed=6),
            GenerationRequest(
                segments=(*pair, text(3), picture(32, 1.8, 9)), grids=small, seed=7, guidance=(0.0, 2.0, 1.0)
            ),
            # Captions.
            GenerationRequest(segments=(picture(64), text(4)), task="text", seed=8, max_text_tokens=9),
            GenerationRequest(segments=(picture(32, 1.8, 1),), task="text", seed=9, max_text_tokens=5),
            # A story, a thought and its picture.
            GenerationRequest(
                segments=(text(5, 9),), task="interleaved", grids=small, seed=10, max_text_tokens=4, max_images=3,
                guidance=2.0,
            ),
            GenerationRequest(
                segments=(picture(32), text(2)), task="interleaved", grids=wide, seed=11, max_text_tokens=3, max_images=2
            ),
            GenerationRequest(segments=(text(7, 7),), task="reasoning", grids=square, seed=12, max_text_tokens=6),
            # Inpainting, and details anew.
            GenerationRequest(segments=(text(6),), grids=square, seed=13, guidance=1.0, given=painted),
            GenerationRequest(segments=(text(6, 3),), grids=small, seed=14, given=coarse),
        ]  # fmt: skip


@pytest.fixture(scope="session")
def studio() -> Studio:
    return Studio()


@pytest.fixture(scope="session", params=["single", "dual"])
def transformer(request, studio) -> Transformer:
    return studio.transformer(request.param)
