"""What a document costs: FLOPs of the transformer under the visibility law, in training and in cached generation.

A product of [m, k] and [k, n] counts 2 m k n, as `torch.utils.flop_counter` counts it. Forward, for each

    position and layer        2 W (H + 2 G) D  +  2 H D W  +  6 W M       q, k, v, output; gate, up, down
    visible pair and layer    4 H D                                       scores, weighted sum
    cell of an image block    2 C W  +  2 W^2                             connector
    target                    2 W V                                       head

Not counted, because together they are well below a hundredth: norms, rotary embedding, softmax, SiLU, look-ups, resizing, the
optimiser. Attention is counted over the pairs that see each other, so a document costs the same in every pack and costs
add up. A kernel with a dense mask computes all L x L pairs of a row instead.

Shapes: W width, H query heads, G key/value heads, D head width, M MLP width, C channels of a code, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nextflow.sequence.documents import Document, TextSegment
from nextflow.sequence.scales import Grid


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes of `model.transformer` that FLOPs depend on, by the same names. The defaults are Qwen2.5-VL-7B's."""

    width: int = 3584
    """Channels of the residual stream."""
    num_layers: int = 28
    """Decoder blocks."""
    num_heads: int = 28
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads."""
    head_dim: int = 128
    """Channels of a head."""
    mlp_width: int = 18944
    """Hidden channels of the gated MLP."""

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """The shape of anything with these attributes, such as a transformer's configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a forward pass has to do, in numbers that do not depend on the model. Works of documents add up."""

    positions: int = 0
    """Positions that go through the blocks."""
    pairs: int = 0
    """Pairs of a query and a key that it sees."""
    cells: int = 0
    """Positions that go through the connector."""
    targets: int = 0
    """Positions that go through the head."""

    def __add__(self, other: Work) -> Work:
        return Work(**{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)})


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs by part."""

    blocks: float
    """Projections and MLPs."""
    attention: float
    """Scores and weighted sums."""
    connector: float
    head: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.blocks + self.attention + self.connector + self.head


@dataclass(frozen=True, kw_only=True)
class FlopsModel:
    """FLOPs of a transformer of this shape."""

    shape: DecoderShape
    vocabulary_size: int
    """Rows of the head: text ids, `<boi>`, `<eoi>`, codes. Generation computes the rows of one kind alone."""
    code_dim: int = 40
    """Channels of a code vector. The paper's parent has 32 + 8; a few channels more or less do not matter here."""

    def forward(self, work: Work) -> Flops:
        """One forward pass."""
        s = self.shape
        attention_width = s.num_heads * s.head_dim
        projections = s.width * (s.num_heads + 2 * s.num_kv_heads) * s.head_dim + attention_width * s.width
        return Flops(
            blocks=2.0 * s.num_layers * work.positions * (projections + 3 * s.width * s.mlp_width),
            attention=4.0 * s.num_layers * work.pairs * attention_width,
            connector=2.0 * work.cells * (self.code_dim * s.width + s.width**2),
            head=2.0 * work.targets * s.width * self.vocabulary_size,
        )

    def training(self, work: Work, *, checkpointing: bool = False, blocks_train: bool = True) -> Flops:
        """Forward and backward as executed.

        A product takes two more in the backward pass, one if its weight is frozen; attention takes five for its two, as it
        computes the scores again.

        Args:
            work: of the rows.
            checkpointing: whether the blocks are run a second time in the backward pass (activation checkpointing).
            blocks_train: false where the blocks are frozen (alignment); gradients still go through them.
        """
        once = self.forward(work)
        again = 1.0 if checkpointing else 0.0
        return Flops(
            blocks=((3.0 if blocks_train else 2.0) + again) * once.blocks,
            attention=(3.5 + again) * once.attention,
            connector=3.0 * once.connector,
            head=3.0 * once.head,
        )

    def of_the_model(self, work: Work, *, blocks_train: bool = True) -> float:
        """What a training step cannot do without, and MFU is measured by: three forward passes, nothing computed again."""
        once = self.forward(work)
        return 3.0 * once.total - (0.0 if blocks_train else once.blocks)

    def in_positions(self, work: Work) -> float:
        """Training FLOPs in units of one position that sees nothing and predicts nothing: the unit of `data.budget`.

        It is at least the number of positions; attention, targets and image cells come on top.
        """
        return self.training(work).total / self.training(Work(positions=1)).total


def document_work(document: Document, *, feed_last_scale: bool = False) -> Work:
    """Work of a document in training: `<start>`, its segments, and the target `<end>`."""
    work = _text_work(1, 0)
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            work += _text_work(len(segment.ids), work.positions)
            targets = len(segment.ids)
        else:
            sizes = [height * width for height, width in segment.grids]
            fed = sizes[1:] + (sizes[-1:] if feed_last_scale else [])
            work += _text_work(1, work.positions)  # <boi>
            for size in fed:
                work += _block_work(size, work.positions)
            work += _text_work(1, work.positions)  # <eoi>
            targets = 1 + sum(sizes)  # <boi> is a target too
        work += Work(targets=targets if segment.loss else 0)
    ends = document.segments[-1].loss if document.segments else True
    return work + Work(targets=int(ends))


def visible_pairs(document_BL: Tensor, block_BL: Tensor) -> Tensor:
    """Pairs of a query and a key that it sees in packed rows, a scalar on their device; padding sees nothing.

    Args:
        document_BL: int64, documents of the rows, each in one piece; negative for padding.
        block_BL: int64, running numbers of blocks, which do not fall inside of a document.
    """
    index_BL = torch.arange(document_BL.shape[1], device=document_BL.device).expand_as(document_BL)
    starts = torch.ones_like(document_BL, dtype=torch.bool)
    starts[:, 1:] = document_BL[:, 1:] != document_BL[:, :-1]
    ends = torch.ones_like(starts)
    ends[:, :-1] = starts[:, 1:] | (block_BL[:, 1:] != block_BL[:, :-1])
    # A query sees from the start of its document to the end of its block.
    first_BL = torch.where(starts, index_BL, 0).cummax(dim=1).values
    last_BL = torch.where(ends, index_BL, index_BL.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return ((last_BL - first_BL + 1) * (document_BL >= 0)).sum()


def generation_work(grids: tuple[Grid, ...], *, prompt: int) -> list[Work]:
    """Work of each step of generating one image with a cache: the prompt with `<boi>`, then one scale each.

    Args:
        grids: grids of the image's scales, coarse to fine.
        prompt: positions in front of `<boi>`, `<start>` included; text, so each sees those before it.
    """
    sizes = [height * width for height, width in grids]
    steps = [_text_work(prompt + 1, 0) + Work(targets=1)]
    for before, size in zip(accumulate(sizes), sizes[1:]):
        steps.append(_block_work(size, prompt + before) + Work(targets=size))
    return steps


def paper_flops(queries: int, keys: int, *, width: int) -> int:
    """The paper's closed formula for one layer (appendix A.2): 12 s_q h^2 + 4 s_q s_kv h.

    Its MLP, 4 s_q h^2, has h hidden channels; Qwen2.5-VL-7B's has 5.3 h and three matrices. The paper's own totals follow from
    h = 2048 and from a schedule that has its 10x10 scale twice, not from the published one.
    """
    return 12 * queries * width**2 + 4 * queries * keys * width


def paper_generation_flops(grids: tuple[Grid, ...], *, width: int) -> int:
    """The paper's formula over the scales of one image: scale k asks with its own codes and sees all up to them. One layer."""
    sizes = [height * width_ for height, width_ in grids]
    return sum(paper_flops(size, seen, width=width) for size, seen in zip(sizes, accumulate(sizes)))


def _text_work(count: int, before: int) -> Work:
    """Positions that are a block each, behind `before` positions of the same document."""
    return Work(positions=count, pairs=count * before + count * (count + 1) // 2)


def _block_work(cells: int, before: int) -> Work:
    """One scale: every cell sees all cells and all positions before them."""
    return Work(positions=cells, pairs=cells * (before + cells), cells=cells)
