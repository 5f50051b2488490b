"""Nearest entry of a codebook in one Triton kernel; `codebook.py` chooses it and holds its reference.

    index_n = argmin_k  bias_k + vectors_n . entries_k

A program holds a block of vectors and walks over a range of the entries, block by block, with the best score and index so far
in registers: no score is ever written. Where there are too few vectors to fill a GPU, several programs share a block of
vectors and split the entries between them; the winners of the ranges are compared afterwards. Products are exact fp32
("ieee": no TF32), as the paper asks.

N vectors, K entries, C channels, R ranges of entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VECTORS, ENTRIES, CHANNELS = 64, 128, 16
"""One product: vectors x channels times channels x entries. 16 channels are the fewest that `tl.dot` takes."""
PROGRAMS = 1024
"""Programs worth starting at once: some for each of the about 130 processors of a large GPU."""


def nearest(vectors_NC: Tensor, entries_KC: Tensor, bias_K: Tensor) -> Tensor:
    """Index of the smallest score of each vector, int64 [N]; the lowest index among equal scores.

    All three are fp32. Raises ValueError for tensors on a CPU, unless Triton's interpreter is on.
    """
    if not vectors_NC.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"nearest_code: 'triton' needs CUDA tensors, and these are on {vectors_NC.device}; use 'auto' or 'chunked' "
            "(TRITON_INTERPRET=1 runs it slowly on a CPU)"
        )
    (N, C), K = vectors_NC.shape, len(entries_KC)
    blocks, steps = triton.cdiv(N, VECTORS), triton.cdiv(K, ENTRIES)
    ranges = min(steps, triton.cdiv(PROGRAMS, max(1, blocks)))
    steps = triton.cdiv(steps, ranges)
    best_RN = vectors_NC.new_empty(ranges, N)
    index_RN = torch.empty_like(best_RN, dtype=torch.int32)
    if N:
        with torch.cuda.device_of(vectors_NC):  # Triton starts on the current device, which need not be the tensors'
            _nearest[(blocks, ranges)](
                vectors_NC.contiguous(), entries_KC.contiguous(), bias_K.contiguous(), best_RN, index_RN, N, K, C, steps,
                VECTORS=VECTORS, ENTRIES=ENTRIES, CHANNELS=CHANNELS, num_warps=8,
            )  # fmt: skip
    # ranges stand in the order of their entries, and argmin returns the first minimum: again the lowest index
    return index_RN.gather(0, best_RN.argmin(dim=0, keepdim=True))[0].long()


@triton.jit
def _nearest(
    vectors_NC, entries_KC, bias_K, best_RN, index_RN, N, K, C, steps,
    VECTORS: tl.constexpr, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    first = tl.program_id(1) * steps * ENTRIES
    best = tl.full([VECTORS], float("inf"), tl.float32)
    index = tl.zeros([VECTORS], tl.int32)
    for step in range(steps):
        column = first + step * ENTRIES + tl.arange(0, ENTRIES)
        # entries past the end get an infinite bias below: they are never nearest
        product = tl.zeros([VECTORS, ENTRIES], tl.float32)
        for start in range(0, C, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            vectors = tl.load(
                vectors_NC + row[:, None] * C + channel[None, :],
                mask=(row[:, None] < N) & (channel[None, :] < C),
                other=0.0,
            )
            entries = tl.load(
                entries_KC + column[None, :].to(tl.int64) * C + channel[:, None],
                mask=(column[None, :] < K) & (channel[:, None] < C),
                other=0.0,
            )
            product = tl.dot(vectors, entries, product, input_precision="ieee")
        score = product + tl.load(bias_K + column, mask=column < K, other=float("inf"))[None, :]
        smallest, position = tl.min(score, axis=1, return_indices=True)
        # strictly smaller: an equally near entry of an earlier block keeps its place
        index = tl.where(smallest < best, first + step * ENTRIES + position, index)
        best = tl.minimum(smallest, best)
    at = tl.program_id(1).to(tl.int64) * N + row
    tl.store(best_RN + at, best, mask=row < N)
    tl.store(index_RN + at, index, mask=row < N)
