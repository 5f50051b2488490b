"""Where a training step of an OpenMoji transformer goes: self time of every operation on a CPU, summed by part of the model.

    python benchmarks/training_profile.py [--width 384] [--layers 6] [--level 64] [--documents 32] [--dtype bfloat16]

A step is forward, loss, backward, clipping and fused AdamW on documents of a caption and a picture, one per row. Seconds are of
the processor, one thread, the fastest of `--rounds` without the profiler; shares are `torch.profiler`'s. An operation belongs
to the part whose autograd function it runs inside of, else a matrix product to the layer that has its sizes.
"""

import argparse
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from nextflow.lightning_modules.optim import parameter_groups
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import PADDING, lay_out
from nextflow.sequence.scales import ScaleSchedule, num_codes_of

SCHEDULE = ScaleSchedule(sides=tuple(range(1, 9)), levels={32: 4, 64: 8}, stride=8)
TEXT_SIZE, CODEBOOK_SIZE = 4096, 4096
PRODUCTS = ("aten::mm", "aten::addmm")
SCORES = ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data")


def main() -> None:
    """Time some steps, profile one, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64, the width of a head")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--level", type=int, choices=tuple(SCHEDULE.levels), default=64)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = TransformerConfig(
        width=options.width, num_layers=options.layers, num_heads=options.width // 64, num_kv_heads=2, head_dim=64,
        mlp_width=3 * options.width, rope_theta=10.0, rope_sections=(8, 12, 12), max_scales=8, text_size=TEXT_SIZE,
        codebook_size=CODEBOOK_SIZE, code_dim=24, start_id=0, end_id=1,
    )  # fmt: skip
    model = Transformer(config)
    model.set_attention(options.attention)
    rows = lay_out([[_document(options.level)] for _ in range(options.documents)], config.vocabulary, LayoutConfig())
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, fused=True)

    def step() -> float:
        since = time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if options.dtype == "bfloat16" else nullcontext():
            tokens = model.cross_entropy(model(rows), rows.target_BL, rows.weight_BL)
        (tokens.total / rows.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - since

    step()
    seconds = min(step() for _ in range(options.rounds))
    positions = int((rows.document_BL != PADDING).sum())
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{parameters:.1f}M parameters, {positions} positions, {options.dtype}, attention {options.attention}")
    print(f"{seconds * 1e3:.0f} ms a step, {positions / seconds:.0f} positions per second")
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as run:
        step()
    parts: Counter[str] = Counter()
    for event in run.events():
        parts[_part(event, config)] += event.self_cpu_time_total
    whole = sum(parts.values())
    for part, spent in parts.most_common():
        print(f"{100 * spent / whole:5.1f} %  {part}")


def _document(level: int) -> Document:
    grids = SCHEDULE.grids(level)
    text = torch.randint(2, TEXT_SIZE, (int(torch.randint(5, 14, ())),)).tolist()
    codes = torch.randint(0, CODEBOOK_SIZE, (num_codes_of(grids),))
    return Document(segments=(TextSegment(ids=text), ImageSegment(grids=grids, codes=codes)))


def _part(event: Any, config: TransformerConfig) -> str:
    inside = {event.name}
    parent = event.cpu_parent
    while parent is not None:
        inside.add(parent.name)
        parent = parent.cpu_parent
    sizes = {size for shape in event.input_shapes or () for size in shape}
    if any("RMSNorm" in name for name in inside):
        return "norms"
    if any(name.startswith("_Total") for name in inside):
        return "head: products" if event.name in PRODUCTS else "loss beside its products"
    if any("adamw" in name or "_foreach" in name or "linalg" in name for name in inside):
        return "clipping, optimiser"
    if event.name in SCORES:
        return "attention: scores, softmax, sums"
    if event.name in PRODUCTS:
        if sizes & {config.mlp_width, 2 * config.mlp_width}:
            return "MLP: products"
        return "connector" if config.code_dim in sizes else "q, k, v, output: products"
    if config.mlp_width in sizes or 2 * config.mlp_width in sizes:
        return "MLP: gate"
    return "the rest: casts, sums of the stream, rotation, embedding, masks"


if __name__ == "__main__":
    main()
