"""Useful tokens per second of the three packing strategies, and how long ranks wait for each other.

    python benchmarks/packing.py [--batches 8] [--shrink 8] [--documents 16] [--simulated 4000] [--seed 1] [--output FOLDER]

Documents are those of the 512 stage (paper, table 2): 700 texts to 345 pairs of a caption and an image of level 512. The paper
does not say how long texts are; its 1.8T tokens leave some 390 ids to a text when the images of all documents are taken off
(two to an edit, four to a story), and texts of the web are about log-normal: lengths here have that mean and sigma 1.1, cut at
8,192 positions; captions have mean 100 and sigma 0.4; images any of the 41 aspect ratios (3,318 to 3,689 codes).

Measured: forward and backward of a small model on one core, in interleaved rounds, the faster of two runs of each batch;
seconds are those of the process, so that other load on the machine hardly counts. Lengths are divided by `--shrink` so that
attention's share of the work is about what it is in a 7B at full length. `padded` puts `--documents` documents into a batch
(TokenFlow's 16 per device), the other two as many tokens as those hold on average.

Idle share: 1 - mean / max over ranks of the work of a batch, by the FLOPs model of the 7B at full length.

`--output` keeps the figures of each strategy in OUTPUT/STRATEGY/seed_SEED/metrics.json: useful tokens per second of one device,
and of each of RANKS, idle time taken off.

Claim (paper, table 3, 1,024 devices): fixed_length 3.4 times padded, fixed_budget 4.1 times.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import Document, ImageSegment, TextSegment, Vocabulary
from nextflow.sequence.flops import DecoderShape, FlopsModel, Work, document_work
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import PackedRows, lay_out
from nextflow.sequence.packing import LOOKAHEAD, pack_fixed_budget, pack_fixed_length
from nextflow.sequence.scales import NEXTFLOW_BASE_GRIDS, ScaleSchedule, num_codes_of

TEXT_SHARE = 700 / (700 + 345)
TEXT_MEAN, TEXT_SIGMA, TEXT_LIMIT = 390, 1.1, 8192
CAPTION_MEAN, CAPTION_SIGMA = 100, 0.4
STRATEGIES = ("padded", "fixed_length", "fixed_budget")
RANKS = (8, 64, 1024)
FULL = ScaleSchedule.nextflow()
SEVEN_B = FlopsModel(shape=DecoderShape(), vocabulary_size=152_064 + 2 + 32_768)


def shrunk_schedule(factor: float) -> tuple[ScaleSchedule, int]:
    """A schedule whose square images have about 1/factor of the codes of level 512, and its level."""
    sides: list[int] = []
    while sum(side**2 for side in sides) < 3684 / factor:
        sides.append(len(sides) + 1)
    return ScaleSchedule(sides=tuple(sides), levels={16 * len(sides): len(sides)}), 16 * len(sides)


def documents(seed: int, schedule: ScaleSchedule, level: int, shrink: float) -> Iterator[Document]:
    """An endless stream of the mix."""
    draw = np.random.default_rng(seed)

    def length(mean: float, sigma: float) -> int:
        value = draw.lognormal(np.log(mean) - sigma**2 / 2, sigma)
        return max(1, round(min(value, TEXT_LIMIT - 2) / shrink))

    while True:
        if draw.random() < TEXT_SHARE:
            yield Document(segments=(TextSegment(ids=[2] * length(TEXT_MEAN, TEXT_SIGMA)),))
        else:
            height, width = NEXTFLOW_BASE_GRIDS[draw.integers(len(NEXTFLOW_BASE_GRIDS))]
            grids = schedule.grids(level, height / width)
            codes = torch.zeros(num_codes_of(grids), dtype=torch.long)
            caption = TextSegment(ids=[2] * length(CAPTION_MEAN, CAPTION_SIGMA))
            yield Document(segments=(caption, ImageSegment(grids=grids, codes=codes)))


def batches(
    strategy: str, stream: Iterator[Document], flops: FlopsModel, num_documents: int, tokens: int, budget: float
) -> Iterator[list[list[Document]]]:
    """Rows of one batch after the other: `padded` has so many documents, the others one row of what those hold on average."""
    waiting: list[tuple[Document, Work]] = []
    while True:
        document = next(stream)
        waiting.append((document, document_work(document)))
        if strategy == "padded":
            rows = [[index] for index in range(num_documents)] if len(waiting) == num_documents else None
        elif strategy == "fixed_length":
            lengths = [work.positions for _, work in waiting]
            rows = pack_fixed_length(lengths, tokens)[:1] if sum(lengths) > tokens else None
        else:
            row = pack_fixed_budget([flops.in_positions(work) for _, work in waiting], budget, LOOKAHEAD)
            rows = None if row is None else [row]
        if rows is not None:
            yield [[waiting[index][0] for index in row] for row in rows]
            taken = {index for row in rows for index in row}
            waiting = [item for index, item in enumerate(waiting) if index not in taken]


def work_of(rows: list[list[Document]], flops: FlopsModel, length: int | None) -> float:
    """FLOPs of a batch: attention over visible pairs, everything else also at padding, up to `length` or the longest row."""
    works = [sum(map(document_work, row), Work()) for row in rows]
    total = sum(works, Work())
    padded = len(rows) * (length or max(work.positions for work in works))
    return flops.training(Work(positions=padded, pairs=total.pairs, cells=total.cells, targets=total.targets)).total


def idle_share(work: np.ndarray, ranks: int) -> float:
    """Share of the time that ranks wait for the slowest, over steps of batches drawn from `work`."""
    drawn = np.random.default_rng(0).choice(work, (400, ranks))
    return float(1 - drawn.mean() / drawn.max(axis=1).mean())


def seconds(model: Transformer, rows: PackedRows) -> float:
    """Processor seconds of one forward and backward, the faster of two: other load on the machine only ever adds."""
    times = []
    for _ in range(2):
        model.zero_grad()
        started = time.process_time()
        loss = model.cross_entropy(model(rows), rows.target_BL, rows.weight_BL).total / rows.num_targets
        loss.backward()
        times.append(time.process_time() - started)
    return min(times)


def sizes_of(stream: Iterator[Document], flops: FlopsModel, count: int) -> tuple[float, float, float]:
    """Mean positions and mean work in positions of a document, and attention's share of the forward FLOPs."""
    works = [document_work(next(stream)) for _ in range(count)]
    total = flops.forward(sum(works, Work()))
    positions = sum(work.positions for work in works) / count
    return positions, sum(map(flops.in_positions, works)) / count, total.attention / total.total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=8, help="measured batches of each strategy")
    parser.add_argument("--shrink", type=float, default=8, help="divides all lengths of the measured part")
    parser.add_argument("--documents", type=int, default=16, help="documents of a padded batch")
    parser.add_argument("--simulated", type=int, default=4000, help="simulated batches of each strategy")
    parser.add_argument("--seed", type=int, default=1, help="of the documents")
    parser.add_argument("--output", type=Path, help="folder for the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    schedule, level = shrunk_schedule(options.shrink)
    config = TransformerConfig(
        width=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, mlp_width=1024, rope_sections=(8, 12, 12),
        max_scales=len(schedule.sides), text_size=256, codebook_size=512, code_dim=24, start_id=0, end_id=1,
    )  # fmt: skip
    model = Transformer(config)
    small = FlopsModel(shape=DecoderShape.of(config), vocabulary_size=config.vocabulary.size, code_dim=config.code_dim)
    plain = {"7B": (512, FULL, 1.0, SEVEN_B), "small": (level, schedule, options.shrink, small)}
    capacity = {}
    for name, (level_, schedule_, shrink, flops) in plain.items():
        mean, work, attention = sizes_of(documents(3 * options.seed - 2, schedule_, level_, shrink), flops, 4000)
        capacity[name] = {"tokens": round(options.documents * mean), "budget": options.documents * work}
        print(f"{name:<6} a document has {mean:,.0f} positions on average; attention is {attention:.0%} of the work")

    def stream_of(strategy: str, name: str, seed: int) -> Iterator[list[list[Document]]]:
        level_, schedule_, shrink, flops = plain[name]
        return batches(strategy, documents(seed, schedule_, level_, shrink), flops, options.documents, **capacity[name])

    measured = measure(
        model,
        lambda strategy: stream_of(strategy, "small", 3 * options.seed - 1),
        options.batches,
        capacity["small"]["tokens"],
    )
    idle = {}
    for strategy in STRATEGIES:
        stream = stream_of(strategy, "7B", 3 * options.seed)
        length = capacity["7B"]["tokens"] if strategy == "fixed_length" else None
        work = np.array([work_of(next(stream), SEVEN_B, length) for _ in range(options.simulated)])
        idle[strategy] = {ranks: idle_share(work, ranks) for ranks in RANKS}
    show(measured, idle)
    if options.output is not None:
        for strategy, (rate, share) in measured.items():
            path = options.output / strategy / f"seed_{options.seed}" / "metrics.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            busy = {f"tokens_per_second/{ranks}": rate * (1 - idle[strategy][ranks]) for ranks in RANKS}
            path.write_text(json.dumps({"tokens_per_second": rate, "useful_positions": share, **busy}, indent=1) + "\n")


def measure(
    model: Transformer, stream_of: Callable[[str], Iterator[list[list[Document]]]], rounds: int, tokens: int
) -> dict[str, tuple[float, float]]:
    """Useful tokens per second, and their share of all positions, of each strategy; rounds are interleaved."""
    vocabulary: Vocabulary = model.vocabulary
    streams = {strategy: stream_of(strategy) for strategy in STRATEGIES}
    useful, positions, spent = (dict.fromkeys(STRATEGIES, 0.0) for _ in range(3))
    for round_number in range(rounds + 1):
        for strategy, stream in streams.items():
            length = tokens if strategy == "fixed_length" else None
            rows = lay_out(next(stream), vocabulary, LayoutConfig(), length)
            elapsed = seconds(model, rows)
            if round_number:  # the first warms up
                useful[strategy] += int((rows.document_BL >= 0).sum())
                positions[strategy] += rows.document_BL.numel()
                spent[strategy] += elapsed
    return {name: (useful[name] / spent[name], useful[name] / positions[name]) for name in STRATEGIES}


def show(measured: dict[str, tuple[float, float]], idle: dict[str, dict[int, float]]) -> None:
    """The table: one process as measured, and many ranks as measured times the share of time that they do not wait."""
    base = measured["padded"][0]
    print(f"\n{'':<14}{'useful':>9}{'tokens/s':>10}{'times':>8}", end="")
    print("".join(f"{f'idle {ranks}':>11}{'times':>8}" for ranks in RANKS))
    for name, (rate, share) in measured.items():
        print(f"{name:<14}{share:>9.1%}{rate:>10.0f}{rate / base:>8.2f}", end="")
        for ranks in RANKS:
            busy = (1 - idle[name][ranks]) / (1 - idle["padded"][ranks])
            print(f"{idle[name][ranks]:>11.1%}{rate / base * busy:>8.2f}", end="")
        print()


if __name__ == "__main__":
    main()
