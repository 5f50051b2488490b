"""The pixel branch's two layouts beside each other: one training step of encoder, quantiser and decoder.

    python benchmarks/pixel_layout.py [--width 64] [--batch 32] [--level 64] [--repeats 5]

Claim (`configs/quickstart`): `patchified`, which convolves at 1/4 resolution and below, trains several times faster on a CPU
than `vqgan`, which convolves at full resolution. Same stride, same widths at the two lowest resolutions, same blocks per
resolution; rounds are interleaved and the fastest of each side counts.
"""

import argparse
import time

import torch

from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.sequence.scales import ScaleSchedule

SCHEDULE = ScaleSchedule(sides=(1, 2, 3, 4, 6, 8), levels={32: 4, 64: 6}, stride=8)


def tokenizer(layout: str, width: int) -> Tokenizer:
    """The quickstart's pixel stage in one of the layouts."""
    shape = {"stem": 4, "multipliers": (1, 2)} if layout == "patchified" else {"stem": 1, "multipliers": (1, 1, 1, 2)}
    pixel = PixelConfig(layout=layout, width=width, num_blocks=2, attention=False, latent_width=128, groups=8, **shape)
    return Tokenizer(TokenizerConfig(schedule=SCHEDULE, codebook_size=1024, semantic=None, pixel=pixel))


def seconds(model: Tokenizer, images_BCHW: torch.Tensor, level: int) -> float:
    """One forward and backward under bfloat16 autocast."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images_BCHW, SCHEDULE.grids(level))
    loss = (output.images_BCHW.float() - images_BCHW).square().mean() + output.quantizer.codebook_loss
    loss.backward()
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--level", type=int, default=64, choices=sorted(SCHEDULE.levels))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    images_BCHW = torch.rand(options.batch, 3, options.level, options.level) * 2 - 1
    models = {layout: tokenizer(layout, options.width) for layout in ("vqgan", "patchified")}
    best = dict.fromkeys(models, float("inf"))
    for _ in range(options.repeats + 1):
        for layout, model in models.items():
            best[layout] = min(best[layout], seconds(model, images_BCHW, options.level))
    for layout, value in best.items():
        million = sum(p.numel() for p in models[layout].parameters()) / 1e6
        print(f"{layout:<12}{million:>7.2f}M parameters{value * 1e3:>9.0f} ms{options.batch / value:>9.0f} images/s")
    print(f"vqgan / patchified: {best['vqgan'] / best['patchified']:.2f}")


if __name__ == "__main__":
    main()
