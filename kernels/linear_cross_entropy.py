"""Cross-entropy of a linear head without its logits: loss[n] = logsumexp(W x[n]) - (W x[n])[target[n]].

With a vocabulary of 152k text ids and 16k to 256k codes the logits of one pack would outweigh the model, so tokens go through
the head in chunks and the backward pass computes each chunk again. Matrix products run in the autocast dtype,
softmax and losses in float32. Positions without a target never meet the head.

Shapes: N tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Logits held at once. 2^20 float32 numbers stay near a CPU's cache; a GPU wants larger matrix products.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}


class LinearCrossEntropy(NamedTuple):
    """What training needs to know about each token."""

    loss_N: Tensor
    """float32, differentiable in x and W; 0 where the target is ignored."""
    correct_N: Tensor
    """bool, the most probable id is the target; False where it is ignored."""


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ignore_index: int = -100
) -> LinearCrossEntropy:
    """Per-token cross-entropy of softmax(x W^T), never holding more than a chunk of the logits.

    Args:
        x_ND: hidden states.
        weight_VD: rows of the output head.
        target_N: int64 ids in [0, V), or `ignore_index`.
        ignore_index: target of positions that predict nothing.
    """
    kept_M = (target_N != ignore_index).nonzero().squeeze(1)
    everything = kept_M.numel() == target_N.numel()
    x_MD, target_M = (x_ND, target_N) if everything else (x_ND[kept_M], target_N[kept_M])
    loss_M, correct_M = _ChunkedCrossEntropy.apply(x_MD, weight_VD, target_M)
    if everything:
        return LinearCrossEntropy(loss_M, correct_M)
    loss_N = loss_M.new_zeros(target_N.shape).index_copy(0, kept_M, loss_M)
    return LinearCrossEntropy(loss_N, correct_M.new_zeros(target_N.shape).index_copy(0, kept_M, correct_M))


def linear_cross_entropy_ref(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, ignore_index: int = -100
) -> LinearCrossEntropy:
    """The same with all logits at once."""
    logits_NV = (x_ND @ weight_VD.t()).float()
    loss_N = F.cross_entropy(logits_NV, target_N, ignore_index=ignore_index, reduction="none")
    return LinearCrossEntropy(loss_N, logits_NV.argmax(-1) == target_N)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor):
        ctx.x_dtype, ctx.weight_dtype = x_ND.dtype, weight_VD.dtype
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        x_ND, weight_VD = x_ND.to(dtype), weight_VD.to(dtype)
        N = x_ND.shape[0]
        loss_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
        lse_N = torch.empty_like(loss_N)
        correct_N = torch.empty(N, dtype=torch.bool, device=x_ND.device)
        for chunk in _chunks(N, weight_VD):
            target_C = target_N[chunk]
            logits_CV = (x_ND[chunk] @ weight_VD.t()).float()
            top_C, best_C = logits_CV.max(-1)
            target_logit_C = logits_CV.gather(1, target_C[:, None]).squeeze(1)
            lse_N[chunk] = logits_CV.sub_(top_C[:, None]).exp_().sum(-1).log_().add_(top_C)
            loss_N[chunk] = lse_N[chunk] - target_logit_C
            correct_N[chunk] = best_C == target_C
        ctx.save_for_backward(x_ND, weight_VD, target_N, lse_N)
        ctx.mark_non_differentiable(correct_N)
        return loss_N, correct_N

    @staticmethod
    def backward(ctx, grad_N: Tensor, _):
        x_ND, weight_VD, target_N, lse_N = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_x_ND = torch.empty_like(x_ND) if need_x else None
        # float32, because many chunks are summed into it.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
        with torch.autocast(x_ND.device.type, enabled=False):
            for chunk in _chunks(x_ND.shape[0], weight_VD):
                x_CD, target_C1 = x_ND[chunk], target_N[chunk][:, None]
                # d loss / d logits = softmax - one_hot
                slope_CV = (x_CD @ weight_VD.t()).float().sub_(lse_N[chunk][:, None]).exp_()
                slope_CV.scatter_add_(1, target_C1, slope_CV.new_full((1, 1), -1.0).expand_as(target_C1))
                slope_CV = slope_CV.mul_(grad_N[chunk][:, None]).to(x_ND.dtype)
                if grad_x_ND is not None:
                    torch.mm(slope_CV, weight_VD, out=grad_x_ND[chunk])
                if grad_weight_VD is not None:
                    grad_weight_VD += slope_CV.t() @ x_CD
        grad_x_ND = None if grad_x_ND is None else grad_x_ND.to(ctx.x_dtype)
        grad_weight_VD = None if grad_weight_VD is None else grad_weight_VD.to(ctx.weight_dtype)
        return grad_x_ND, grad_weight_VD, None


def _chunks(N: int, weight_VD: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS.get(weight_VD.device.type, 2**27) // weight_VD.shape[0])
    return [slice(start, min(start + size, N)) for start in range(0, N, size)]
