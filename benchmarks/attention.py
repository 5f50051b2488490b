"""The attention implementations beside each other, forward and backward, on packed rows of captions and pictures.

    python benchmarks/attention.py [--width 256] [--heads 4] [--kv_heads 2] [--repeats 20]

Claim (`kernels/attention.py`): in bfloat16 on a CPU `dense` is several times faster than `sdpa` at the quickstart's lengths.
Rounds are interleaved and the fastest of each side counts, since other load on the machine only ever adds.
"""

import argparse
import time

import torch

from nextflow.kernels.attention import Visibility, attention
from nextflow.sequence.documents import Document, ImageSegment, TextSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out
from nextflow.sequence.scales import ScaleSchedule

SCHEDULE = ScaleSchedule(sides=(1, 2, 3, 4, 6, 8), levels={32: 4, 64: 6}, stride=8)


def visibility_of(level: int, rows: int) -> Visibility:
    """One caption of ten ids and one picture per row."""
    vocabulary = Vocabulary(text_size=100, codebook_size=100, start_id=0, end_id=1)
    grids = SCHEDULE.grids(level)
    document = Document(segments=(TextSegment(ids=range(2, 12)), ImageSegment(grids=grids)))
    packed = lay_out([[document]] * rows, vocabulary, LayoutConfig())
    return Visibility(packed.document_BL, packed.block_BL)


def seconds(
    implementation: str, shapes: tuple[int, int, int, int], visibility: Visibility, dtype: torch.dtype
) -> float:
    """One forward and backward."""
    rows, heads, kv_heads, head_dim = shapes
    length = visibility.document_BL.shape[1]
    q = torch.randn(rows, heads, length, head_dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(rows, kv_heads, length, head_dim, dtype=dtype, requires_grad=True) for _ in range(2))
    started = time.perf_counter()
    attention(q, k, v, visibility, implementation=implementation).float().sum().backward()
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv_heads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    print(f"{'level':>5}{'rows':>6}{'length':>8}{'dtype':>10}{'sdpa (ms)':>12}{'dense (ms)':>12}{'sdpa/dense':>12}")
    for level, rows in ((32, 32), (64, 20)):
        visibility = visibility_of(level, rows)
        shapes = (rows, options.heads, options.kv_heads, options.width // options.heads)
        for dtype in (torch.bfloat16, torch.float32):
            best = {"sdpa": float("inf"), "dense": float("inf")}
            for _ in range(options.repeats):
                for name in best:
                    best[name] = min(best[name], seconds(name, shapes, visibility, dtype))
            sdpa, dense = best["sdpa"] * 1e3, best["dense"] * 1e3
            length = visibility.document_BL.shape[1]
            name = str(dtype).removeprefix("torch.")
            print(f"{level:>5}{rows:>6}{length:>8}{name:>10}{sdpa:>12.2f}{dense:>12.2f}{sdpa / dense:>12.2f}")


if __name__ == "__main__":
    main()
