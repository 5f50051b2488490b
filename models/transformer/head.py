"""Output heads: one softmax over text and codes (the paper's, section 3.2 and figure 9), or one for each (its ablation).

Both offer `forward` (logits over the whole vocabulary), `text_logits` and `code_logits` (those of one kind, for decoding) and
`cross_entropy` (training, no logits).

Shapes: N tokens, W width, V vocabulary, U text ids with <boi> and <eoi>, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nextflow.kernels.linear import linear
from nextflow.kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from nextflow.sequence.documents import Vocabulary

IGNORE = -100


class SingleHead(nn.Linear):
    """One matrix over the whole vocabulary: text ids, <boi>, <eoi>, codes."""

    def __init__(self, width: int, vocabulary: Vocabulary) -> None:
        super().__init__(width, vocabulary.size, bias=False)
        self.code_offset = vocabulary.code_offset

    def text_logits(self, x_NW: Tensor) -> Tensor:
        """Logits [..., U] of text ids, <boi> and <eoi>."""
        return linear(x_NW, self.weight[: self.code_offset])

    def code_logits(self, x_NW: Tensor) -> Tensor:
        """Logits [..., K] of codes."""
        return linear(x_NW, self.weight[self.code_offset :])

    def cross_entropy(
        self, x_NW: Tensor, target_N: Tensor, token_weight_N: Tensor | None = None, *, entropy: bool = False
    ) -> LinearCrossEntropy:
        """Losses per token and in total, as `kernels.linear_cross_entropy`; targets of -100 are ignored."""
        return linear_cross_entropy(x_NW, self.weight, target_N, IGNORE, token_weight_N, entropy=entropy)


class DualHead(nn.Module):
    """A matrix for text, <boi> and <eoi>, another for codes; each target competes with its own kind alone.

    The logits are those of both, side by side. A sampler that draws codes from codes and text from text, as ours does, draws
    from the distribution that was trained.
    """

    def __init__(self, width: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.code_offset = vocabulary.code_offset
        self.text = nn.Linear(width, vocabulary.code_offset, bias=False)
        self.code = nn.Linear(width, vocabulary.codebook_size, bias=False)

    def forward(self, x_NW: Tensor) -> Tensor:
        """Logits [..., V]."""
        return torch.cat((self.text(x_NW), self.code(x_NW)), dim=-1)

    def text_logits(self, x_NW: Tensor) -> Tensor:
        """Logits [..., U] of text ids, <boi> and <eoi>."""
        return linear(x_NW, self.text.weight)

    def code_logits(self, x_NW: Tensor) -> Tensor:
        """Logits [..., K] of codes."""
        return linear(x_NW, self.code.weight)

    def cross_entropy(
        self, x_NW: Tensor, target_N: Tensor, token_weight_N: Tensor | None = None, *, entropy: bool = False
    ) -> LinearCrossEntropy:
        """Losses per token and in total, as `kernels.linear_cross_entropy`; targets of -100 are ignored."""
        is_code_N = target_N >= self.code_offset
        text_N = target_N.masked_fill(is_code_N, IGNORE)
        code_N = (target_N - self.code_offset).masked_fill(~is_code_N, IGNORE)
        text = linear_cross_entropy(x_NW, self.text.weight, text_N, IGNORE, token_weight_N, entropy=entropy)
        code = linear_cross_entropy(x_NW, self.code.weight, code_N, IGNORE, token_weight_N, entropy=entropy)
        return LinearCrossEntropy(
            loss_N=text.loss_N + code.loss_N,
            correct_N=text.correct_N | code.correct_N,
            total=text.total + code.total,
            entropy_N=None if text.entropy_N is None or code.entropy_N is None else text.entropy_N + code.entropy_N,
        )
