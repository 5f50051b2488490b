"""Cross-entropy of a linear head without its logits: loss[n] = logsumexp(W x[n]) - (W x[n])[target[n]].

With a vocabulary of 152k text ids and 16k to 256k codes the logits of one pack would outweigh the model, so they exist in
blocks alone. Matrix products run in the autocast dtype, softmax and losses in float32. Positions without a target never meet
the head. Log-probabilities (-loss_N) and entropies are those that GRPO compares, with the numerics of training.

    chunked   blocks of tokens and vocabulary (`linear_cross_entropy_chunked.py`). Runs everywhere.
    triton    logits are made and used up in registers (`linear_cross_entropy_triton.py`). CUDA.

Shapes: N tokens, M tokens with a target, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.kernels.implementation import resolve

Implementation = Literal["auto", "chunked", "triton", "reference"]


class LinearCrossEntropy(NamedTuple):
    """What training needs to know about each token. All are 0 or False where the target is ignored."""

    loss_N: Tensor
    """float32, cross-entropy of each token, not weighted."""
    correct_N: Tensor
    """bool, no id is more probable than the target."""
    total: Tensor
    """float32 scalar, the sum of token weight times loss."""
    entropy_N: Tensor | None = None
    """float32, entropy of each token's distribution over the vocabulary, when it was asked for."""

    @property
    def log_prob_N(self) -> Tensor:
        """float32, log-probability of each target."""
        return -self.loss_N


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    ignore_index: int = -100,
    token_weight_N: Tensor | None = None,
    *,
    entropy: bool = False,
    implementation: Implementation = "auto",
) -> LinearCrossEntropy:
    """Cross-entropy of softmax(x W^T) per token and in total, never holding more than a block of the logits.

    Args:
        x_ND: hidden states.
        weight_VD: rows of the output head.
        target_N: int64 ids in [0, V), or `ignore_index`.
        ignore_index: target of positions that predict nothing.
        token_weight_N: weight of each token in `total`, a constant. Given, gradients of x and W flow from `total` alone and
            can be made together with the loss, which saves one of four matrix products; per-token results are then plain
            numbers. Without it gradients flow from all results, and the logits are made again for them.
        entropy: also return entropies.
        implementation: "auto", "chunked", "triton" or "reference".

    Raises:
        ValueError: `implementation` cannot run here.
    """
    chosen = resolve("linear_cross_entropy", implementation, x_ND.device.type, anywhere="chunked")
    if chosen == "reference":
        return linear_cross_entropy_ref(x_ND, weight_VD, target_N, ignore_index, token_weight_N, entropy=entropy)
    kept_M = (target_N != ignore_index).nonzero().squeeze(1)
    everything = kept_M.numel() == target_N.numel()
    x_MD, target_M = (x_ND, target_N) if everything else (x_ND[kept_M], target_N[kept_M])
    token_weight_M = token_weight_N
    if token_weight_N is not None:
        token_weight_M = (token_weight_N if everything else token_weight_N[kept_M]).detach().float()
    if chosen == "triton":
        from nextflow.kernels.linear_cross_entropy_triton import cross_entropy_triton as run
    else:
        from nextflow.kernels.linear_cross_entropy_chunked import cross_entropy_chunked as run
    dtype = _product_dtype(x_ND)
    kept = run(x_MD.to(dtype), weight_VD, target_M, token_weight_M, entropy)
    if everything:
        return kept

    def spread(value_M: Tensor) -> Tensor:
        return value_M.new_zeros(target_N.shape).index_copy(0, kept_M, value_M)

    entropy_N = None if kept.entropy_N is None else spread(kept.entropy_N)
    return LinearCrossEntropy(spread(kept.loss_N), spread(kept.correct_N), kept.total, entropy_N)


def linear_cross_entropy_ref(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    ignore_index: int = -100,
    token_weight_N: Tensor | None = None,
    *,
    entropy: bool = False,
    implementation: Implementation = "auto",
) -> LinearCrossEntropy:
    """The same with all logits at once."""
    logits_NV = (x_ND @ weight_VD.t()).float()
    kept_N = target_N != ignore_index
    loss_N = F.cross_entropy(logits_NV, target_N, ignore_index=ignore_index, reduction="none")
    target_logit_N = logits_NV.gather(1, target_N.where(kept_N, 0)[:, None]).squeeze(1)
    correct_N = kept_N & (target_logit_N >= logits_NV.amax(-1))
    total = loss_N.sum() if token_weight_N is None else (loss_N * token_weight_N).sum()
    if not entropy:
        return LinearCrossEntropy(loss_N, correct_N, total)
    log_prob_NV = logits_NV.log_softmax(-1)
    entropy_N = -(log_prob_NV.exp() * log_prob_NV).sum(-1)
    return LinearCrossEntropy(loss_N, correct_N, total, entropy_N * kept_N)


def _product_dtype(x_ND: Tensor) -> torch.dtype:
    device = x_ND.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
