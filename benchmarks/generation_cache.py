"""What the cache saves: the same engine, once with the KV cache, once feeding every row from its beginning at each scale.

    python benchmarks/generation_cache.py --help

Both sides run in this process on the same weights, prompts and seeds, and must draw the same codes; the share that agrees is
printed (sums in another order may flip a draw in a few thousand). The model has random weights: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

from nextflow.generation.engine import Decoding, GenerationRequest
from nextflow.generation.sampling import SamplingConfig
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.scales import ScaleSchedule, num_codes_of


def main() -> None:
    """Time both sides and print a table."""
    options = _parse()
    torch.manual_seed(0)
    device = torch.device(options.device)
    schedule = ScaleSchedule.nextflow() if options.level >= 256 else _small_schedule()
    grids = schedule.grids(options.level)
    config = TransformerConfig(
        text_size=2048, codebook_size=options.codebook_size, start_id=0, end_id=1, code_dim=40, width=options.width,
        num_layers=options.layers, num_heads=options.width // 64, num_kv_heads=max(1, options.width // 128), head_dim=64,
        mlp_width=options.width * 8 // 3, rope_sections=(8, 12, 12),
    )  # fmt: skip
    with device:
        transformer = Transformer(config).eval()
    requests = [
        GenerationRequest(
            segments=(TextSegment(ids=list(range(2, 2 + options.prompt_tokens + seed % 5))),),
            grids=grids,
            seed=seed,
            guidance=options.guidance,
        )
        for seed in range(options.pictures)
    ]
    if options.threads:
        torch.set_num_threads(options.threads)
    sides: dict[str, tuple[float, torch.Tensor]] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
        run(transformer, requests[:1], True)  # warm up
        # The sides take turns, so that a busy machine slows both; the fastest round of each counts.
        for _ in range(options.repeats):
            for name, reuse_cache in (("KV cache", True), ("recomputed", False)):
                started = time.perf_counter()
                codes = run(transformer, requests, reuse_cache)  # ends with the codes on the host
                seconds = time.perf_counter() - started
                sides[name] = (min(seconds, sides[name][0] if name in sides else seconds), codes)
    agreement = (sides["KV cache"][1] == sides["recomputed"][1]).float().mean().item()
    table = Table(
        title=f"{options.pictures} pictures of level {options.level} ({len(grids)} scales, {num_codes_of(grids)} codes), "
        f"guidance {options.guidance:g}, width {options.width}, {options.layers} layers, {options.device}"
    )
    for column in ("side", "seconds", "pictures / s", "ratio"):
        table.add_column(column, justify="right")
    fastest = sides["KV cache"][0]
    for name, (seconds, _) in sides.items():
        table.add_row(name, f"{seconds:.2f}", f"{options.pictures / seconds:.2f}", f"{seconds / fastest:.2f}")
    Console().print(table, f"codes that agree: {agreement:.2%}")


@torch.no_grad()
def run(transformer: Transformer, requests: list[GenerationRequest], reuse_cache: bool) -> torch.Tensor:
    """Codes [requests, N] of one side."""
    decoding = Decoding(
        transformer, requests, layout=LayoutConfig(), sampling=SamplingConfig(), reuse_cache=reuse_cache
    )
    while decoding.active:
        decoding.step()
    return torch.stack([torch.cat(job.drawn) for job in decoding.jobs])


def _small_schedule() -> ScaleSchedule:
    return ScaleSchedule(sides=(1, 2, 3, 4, 5, 6, 8), levels={32: 4, 64: 7}, stride=8, base_grids=((8, 8),))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=16, help="pictures in the one batch")
    parser.add_argument(
        "--level", type=int, default=64, help="32 or 64 (small schedule); 256, 512 or 1024 (the paper's)"
    )
    parser.add_argument("--guidance", type=float, default=2.0, help="0 halves the rows")
    parser.add_argument("--prompt-tokens", type=int, default=8, help="text ids of the shortest prompt")
    parser.add_argument("--width", type=int, default=256, help="width of the transformer, a multiple of 128")
    parser.add_argument("--layers", type=int, default=6, help="layers of the transformer")
    parser.add_argument("--codebook-size", type=int, default=1024, help="number of codes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the fastest of each side counts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument("--bf16", action="store_true", help="under bf16 autocast; rounding then flips more draws")
    return parser.parse_args()


if __name__ == "__main__":
    main()
