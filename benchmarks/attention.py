"""The attention implementations of a CPU beside each other on packed rows, forward and backward, in one run.

    python benchmarks/attention.py [--packs 32 64 256 512] [--heads 8] [--kv_heads 2] [--head_dim 64] [--rounds 3]

Claims (`kernels/attention.py`): on packs of several documents `spans`, which spends no work on what is hidden, is several times
faster than SDPA with a dense mask; on short rows of one document `dense` is, in bfloat16; `auto` takes the better of them.

    32, 64      quickstart and OpenMoji: a caption of 10 ids and one picture per row
    256, 512    the paper's schedule, 900 and 3,684 codes per picture: texts of 64 ids before pictures (text to image), behind
                (image to text) and between them (256: two pictures in one document), and a document of text alone

Rounds are interleaved and the fastest of each side counts; time is of the processor, one thread, since other load on the
machine only ever adds. `visible` is the share of scores that the visibility law shows.
"""

import argparse
import time
from typing import NamedTuple

import torch

from nextflow.kernels.attention import Visibility, attention
from nextflow.sequence.documents import Document, ImageSegment, TextSegment, Vocabulary
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import lay_out
from nextflow.sequence.scales import ScaleSchedule

SIDES = ("sdpa", "dense", "spans", "auto")
OPENMOJI = ScaleSchedule(sides=(1, 2, 3, 4, 6, 8), levels={32: 4, 64: 6}, stride=8)


class Pack(NamedTuple):
    """Rows of a batch, each with the same documents; a document is numbers of text ids and levels of pictures ("p256")."""

    schedule: ScaleSchedule
    rows: int
    documents: tuple[tuple[int | str, ...], ...]


PACKS = {
    "32": Pack(OPENMOJI, 32, ((10, "p32"),)),
    "64": Pack(OPENMOJI, 20, ((10, "p64"),)),
    "256": Pack(ScaleSchedule.nextflow(), 1, ((64, "p256"), ("p256", 64), (64, "p256", 64, "p256"), (200,))),
    "512": Pack(ScaleSchedule.nextflow(), 1, ((64, "p512"), ("p512", 64), (200,))),
}


class Seconds(NamedTuple):
    """Of one pass each."""

    forward: float
    backward: float


def visibility_of(pack: Pack) -> Visibility:
    """The law of its rows."""
    vocabulary = Vocabulary(text_size=100, codebook_size=100, start_id=0, end_id=1)
    documents = [
        Document(
            segments=tuple(
                TextSegment(ids=[2] * part)
                if isinstance(part, int)
                else ImageSegment(grids=pack.schedule.grids(int(part.removeprefix("p"))))
                for part in parts
            )
        )
        for parts in pack.documents
    ]
    packed = lay_out([documents] * pack.rows, vocabulary, LayoutConfig())
    return Visibility(packed.document_BL, packed.block_BL)


def once(side: str, shapes: list[tuple[int, ...]], visibility: Visibility, dtype: torch.dtype) -> Seconds:
    """One forward and backward pass on new inputs."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    slope = torch.randn(shapes[0], dtype=dtype)
    started = time.process_time()
    out = attention(q, k, v, visibility, implementation=side)
    between = time.process_time()
    out.backward(slope)
    return Seconds(between - started, time.process_time() - between)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", nargs="+", choices=tuple(PACKS), default=list(PACKS))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=2)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16", "float32"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("milliseconds; x sdpa: how many times faster than SDPA with a dense mask, forward and backward together")
    columns = f"{'pack':>5}{'rows':>5}{'length':>7}{'visible':>8}{'dtype':>9}{'side':>6}"
    print(f"{columns}{'forward':>9}{'backward':>9}{'x sdpa':>7}")
    for name in options.packs:
        pack = PACKS[name]
        visibility = visibility_of(pack)
        length = visibility.document_BL.shape[1]
        visible = float(visibility.mask_BLL().float().mean())
        heads = (options.heads, options.kv_heads, options.kv_heads)
        shapes = [(pack.rows, count, length, options.head_dim) for count in heads]
        for dtype in options.dtype:
            rounds: dict[str, list[Seconds]] = {side: [] for side in SIDES}
            for _ in range(options.rounds):
                for side in SIDES:
                    rounds[side].append(once(side, shapes, visibility, getattr(torch, dtype)))
            best = {side: Seconds(*(min(column) for column in zip(*all_of))) for side, all_of in rounds.items()}
            for side, (forward, backward) in best.items():
                print(
                    f"{name:>5}{pack.rows:>5}{length:>7}{visible:>8.2f}{dtype:>9}{side:>6}"
                    f"{forward * 1e3:>9.1f}{backward * 1e3:>9.1f}{sum(best['sdpa']) / (forward + backward):>7.2f}"
                )


if __name__ == "__main__":
    main()
