"""`linear_cross_entropy` in blocks of [tokens, ids], on any device; the op itself is in `linear_cross_entropy.py`.

One pass over the vocabulary in blocks of B ids keeps a running maximum m, s = sum exp(l - m) and, for the entropy,
u = sum exp(l - m) (l - m); a block with the larger maximum m' scales them by exp(m - m'). Then

    logsumexp = m + log s,     loss = logsumexp - l[target],     entropy = log s - u / s,
    d loss / d l[v] = p[v] - [v = target],     d entropy / d l[v] = -p[v] (log p[v] + entropy).

Two ways to the gradient. `_PerToken` runs this pass, and makes the logits again when the gradients of the losses are known:
four matrix products, nothing kept. `_Total` knows the weights of the tokens beforehand: it keeps the logits of a few tokens
at a time, makes their gradient at once and forgets them: three products.

Weights may be wider than the products' dtype (autocast): they are cast block by block, for a copy of a large head is
itself large.

Shapes: N tokens, C tokens of a group, D width, V vocabulary, B ids of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nextflow.kernels.linear_cross_entropy import LinearCrossEntropy


class Sizes(NamedTuple):
    """How much is worked on at once."""

    block: int
    """Numbers in a block of logits, and in the rows of W that make it: near the cache of a CPU, large products for a GPU."""
    kept: int
    """Bytes of logits that `_Total` keeps."""
    group: int
    """Tokens that pass over the vocabulary together when nothing is kept."""


SIZES = {"cpu": Sizes(2**20, 80 * 2**20, 4096), "cuda": Sizes(2**27, 2**29, 2**15)}


def cross_entropy_chunked(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, token_weight_N: Tensor | None, entropy: bool
) -> LinearCrossEntropy:
    """`linear_cross_entropy` of tokens that all have a target; x has the dtype of the products."""
    # In float16 a gradient that is made before the loss is scaled would underflow.
    if token_weight_N is None or x_ND.dtype == torch.float16:
        loss_N, correct_N, entropy_N = _PerToken.apply(x_ND, weight_VD, target_N, entropy)
        if token_weight_N is None:
            return LinearCrossEntropy(loss_N, correct_N, loss_N.sum(), entropy_N)
        total = (loss_N * token_weight_N).sum()
        return LinearCrossEntropy(loss_N.detach(), correct_N, total, None if entropy_N is None else entropy_N.detach())
    needs = torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad)
    total, loss_N, correct_N, entropy_N = _Total.apply(x_ND, weight_VD, target_N, token_weight_N, entropy, needs)
    return LinearCrossEntropy(loss_N, correct_N, total, entropy_N)


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, entropy: bool):
        stats = _Stats.empty(target_N, entropy)
        for group in _groups(len(x_ND), SIZES[_device(x_ND)].group):
            _forward(x_ND[group], weight_VD, target_N[group], stats.of(group))
        ctx.save_for_backward(x_ND, weight_VD, target_N, stats.lse_N, stats.entropy_N)
        ctx.mark_non_differentiable(stats.correct_N)
        ctx.set_materialize_grads(False)
        return stats.loss_N, stats.correct_N, stats.entropy_N

    @staticmethod
    def backward(ctx, loss_grad_N: Tensor | None, _, entropy_grad_N: Tensor | None):
        x_ND, weight_VD, target_N, lse_N, entropy_N = ctx.saved_tensors
        if loss_grad_N is None:
            loss_grad_N = torch.zeros_like(lse_N)
        groups = _groups(len(x_ND), SIZES[_device(x_ND)].group)
        gradient = _Gradient.zeros(x_ND, weight_VD, ctx.needs_input_grad, several=len(groups) > 1)
        with torch.autocast(_device(x_ND), enabled=False):
            for group in groups:
                slope = _Slope(
                    lse_N[group],
                    loss_grad_N[group],
                    None if entropy_grad_N is None else entropy_N[group],
                    None if entropy_grad_N is None else entropy_grad_N[group],
                )
                _backward(x_ND[group], weight_VD, target_N[group], slope, gradient.of(group))
        grad_x_ND, grad_weight_VD = gradient.cast(x_ND, weight_VD)
        return grad_x_ND, grad_weight_VD, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_VD, target_N, token_weight_N, entropy: bool, needs_gradient: bool):
        stats = _Stats.empty(target_N, entropy)
        sizes = SIZES[_device(x_ND)]
        size = max(1, sizes.kept // (len(weight_VD) * x_ND.element_size())) if needs_gradient else sizes.group
        gradient = _Gradient.zeros(x_ND, weight_VD, ctx.needs_input_grad, several=True) if needs_gradient else None
        kept = x_ND.new_empty(min(size, len(x_ND)), len(weight_VD)) if needs_gradient else None
        with torch.autocast(_device(x_ND), enabled=False):
            for group in _groups(len(x_ND), size):
                x_CD, target_C = x_ND[group], target_N[group]
                kept_CV = None if kept is None else kept[: len(x_CD)]
                _forward(x_CD, weight_VD, target_C, stats.of(group), kept_CV)
                if gradient is not None:
                    slope = _Slope(stats.lse_N[group], token_weight_N[group], None, None)
                    _backward(x_CD, weight_VD, target_C, slope, gradient.of(group), kept_CV)
        ctx.gradient = gradient.cast(x_ND, weight_VD) if gradient is not None else None
        ctx.mark_non_differentiable(*(value for value in stats.results if value is not None))
        return (stats.loss_N * token_weight_N).sum(), *stats.results

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        if ctx.gradient is None:
            raise RuntimeError(
                "linear_cross_entropy: with token weights the gradient of `total` is made once and handed out once; "
                "call the op again before a second backward"
            )
        gradient, ctx.gradient = ctx.gradient, None
        grad_x_ND, grad_weight_VD = (value if value is None else value.mul_(grad) for value in gradient)
        return grad_x_ND, grad_weight_VD, None, None, None, None


def _forward(x_CD: Tensor, weight_VD: Tensor, target_C: Tensor, stats: _Stats, kept_CV: Tensor | None = None) -> None:
    """One pass over the vocabulary; fills `stats`, and `kept_CV` with the logits."""
    # Not -inf, whose difference to itself is NaN.
    top_C = torch.full_like(stats.lse_N, torch.finfo(torch.float32).min)
    sum_C, moment_C, target_logit_C = (torch.zeros_like(top_C) for _ in range(3))
    for block in _blocks(weight_VD, len(x_CD)):
        weight_BD = weight_VD[block].to(x_CD.dtype)
        if kept_CV is None:
            logits_CB = (x_CD @ weight_BD.t()).float()
        else:
            logits_CB = torch.mm(x_CD, weight_BD.t(), out=kept_CV[:, block]).float()
        inside_C, index_C1 = _within(target_C, block)
        target_logit_C = torch.where(inside_C, logits_CB.gather(1, index_C1).squeeze(1), target_logit_C)
        above_C = torch.maximum(top_C, logits_CB.amax(-1))
        shift_C = top_C - above_C
        shrink_C = shift_C.exp()
        logits_CB = logits_CB - above_C[:, None]
        if stats.entropy_N is None:
            sum_C = sum_C * shrink_C + logits_CB.exp_().sum(-1)
        else:
            exp_CB = logits_CB.exp()
            moment_C = (moment_C + sum_C * shift_C) * shrink_C + exp_CB.mul_(logits_CB).sum(-1)
            sum_C = sum_C * shrink_C + logits_CB.exp_().sum(-1)
        top_C = above_C
    torch.add(top_C, sum_C.log(), out=stats.lse_N)
    torch.sub(stats.lse_N, target_logit_C, out=stats.loss_N)
    torch.ge(target_logit_C, top_C, out=stats.correct_N)
    if stats.entropy_N is not None:
        torch.sub(sum_C.log(), moment_C / sum_C, out=stats.entropy_N)


def _backward(
    x_CD: Tensor, weight_VD: Tensor, target_C: Tensor, slope: _Slope, out: _Gradient, kept_CV: Tensor | None = None
) -> None:
    """One pass over the vocabulary; adds the gradients of a group to `out`. `kept_CV` are its logits, else made again."""
    for block in _blocks(weight_VD, len(x_CD)):
        weight_BD = weight_VD[block].to(x_CD.dtype)
        logits_CB = x_CD @ weight_BD.t() if kept_CV is None else kept_CV[:, block]
        slope_CB = slope.of(logits_CB.float(), target_C, block).to(x_CD.dtype)
        if out.x_ND is not None:
            _add_product(out.x_ND, slope_CB, weight_BD)
        if out.weight_VD is not None:
            _add_product(out.weight_VD[block], slope_CB.t(), x_CD)


class _Slope(NamedTuple):
    """The gradient of the logits, from that of the losses (and of the entropies)."""

    lse_C: Tensor
    loss_grad_C: Tensor
    entropy_C: Tensor | None
    entropy_grad_C: Tensor | None

    def of(self, logits_CB: Tensor, target_C: Tensor, block: slice) -> Tensor:
        log_prob_CB = logits_CB - self.lse_C[:, None]
        if self.entropy_C is None or self.entropy_grad_C is None:
            slope_CB = log_prob_CB.exp_().mul_(self.loss_grad_C[:, None])
        else:
            prob_CB = log_prob_CB.exp()
            factor_CB = log_prob_CB.add_(self.entropy_C[:, None]).mul_(-self.entropy_grad_C[:, None])
            slope_CB = factor_CB.add_(self.loss_grad_C[:, None]).mul_(prob_CB)
        inside_C, index_C1 = _within(target_C, block)
        # Before the cast: near the end of training p - 1 is far smaller than what 16 bits resolve beside 1.
        return slope_CB.scatter_add_(1, index_C1, torch.where(inside_C, -self.loss_grad_C, 0.0)[:, None])


class _Stats(NamedTuple):
    """Per-token results, filled group by group."""

    loss_N: Tensor
    lse_N: Tensor
    correct_N: Tensor
    entropy_N: Tensor | None

    @classmethod
    def empty(cls, target_N: Tensor, entropy: bool) -> _Stats:
        loss_N, lse_N, entropy_N = (torch.empty_like(target_N, dtype=torch.float32) for _ in range(3))
        return cls(loss_N, lse_N, torch.empty_like(target_N, dtype=torch.bool), entropy_N if entropy else None)

    def of(self, group: slice) -> _Stats:
        entropy_N = None if self.entropy_N is None else self.entropy_N[group]
        return _Stats(self.loss_N[group], self.lse_N[group], self.correct_N[group], entropy_N)

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.loss_N, self.correct_N, self.entropy_N


class _Gradient(NamedTuple):
    """Sums of the gradients of x and W; None where not needed."""

    x_ND: Tensor | None
    weight_VD: Tensor | None

    @classmethod
    def zeros(cls, x_ND: Tensor, weight_VD: Tensor, needed: tuple[bool, ...], several: bool) -> _Gradient:
        """float32 where several products are summed; W meets one product per group of tokens."""
        dtype = torch.float32 if several else weight_VD.dtype
        return cls(
            torch.zeros_like(x_ND, dtype=torch.float32) if needed[0] else None,
            torch.zeros_like(weight_VD, dtype=dtype) if needed[1] else None,
        )

    def of(self, group: slice) -> _Gradient:
        return _Gradient(None if self.x_ND is None else self.x_ND[group], self.weight_VD)

    def cast(self, x_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if self.x_ND is None else self.x_ND.to(x_ND.dtype),
            None if self.weight_VD is None else self.weight_VD.to(weight_VD.dtype),
        )


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right


def _within(target_C: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in the block, and each one's place in it as [C, 1] (any place for the others)."""
    inside_C = (target_C >= block.start) & (target_C < block.stop)
    return inside_C, (target_C - block.start).clamp(0, block.stop - block.start - 1)[:, None]


def _blocks(weight_VD: Tensor, tokens: int) -> Iterator[slice]:
    V, D = weight_VD.shape
    size = max(1, SIZES[_device(weight_VD)].block // max(1, tokens, D))
    return (slice(start, min(start + size, V)) for start in range(0, V, size))


def _groups(N: int, size: int) -> list[slice]:
    """Even ones, for each passes over the whole head: a last group of a few tokens would cost nearly as much as the others."""
    count = -(-N // size)
    return [slice(N * index // count, N * (index + 1) // count) for index in range(count)]


def _device(tensor: Tensor) -> str:
    return tensor.device.type if tensor.device.type in SIZES else "cuda"
