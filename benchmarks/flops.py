"""FLOPs of one 1024 x 1024 image: next-scale prediction with a cache against a diffusion transformer of equal width and depth.

    pip install diffusers
    python benchmarks/flops.py [--width 3584] [--layers 28] [--steps 28 18] [--prompt 100]

Both sides are built on the meta device and counted by `torch.utils.flop_counter`: ours is Qwen2.5-VL-7B's decoder with
32,768 codes (18 scales, 10,084 codes, every scale one `step` on a cache); theirs diffusers' SD3Transformer2DModel (MMDiT) with
4,096 latent and 333 text tokens for each of its steps: 28 is usual, 18 is what the paper counts with. Guidance costs
either side a second row. Text encoders and image decoders are left out on both sides.

Claim (paper, appendix A.2): at least 6 times fewer. Its closed formula, with one layer for both sides, is printed below.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from nextflow.generation.cache import KVCache
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.flops import DecoderShape, FlopsModel, Work, generation_work, paper_flops, paper_generation_flops
from nextflow.sequence.scales import Grid, ScaleSchedule

LATENT_SIDE, TEXT_TOKENS, TEXT_WIDTH = 64, 333, 4096
HEAD_DIM = 128
CODES = 32_768


def counted_image(config: TransformerConfig, grids: Sequence[Grid], prompt: int, rows: int) -> int:
    """Every forward pass of one image, on meta tensors: the prompt with <boi>, then each scale."""
    with torch.device("meta"):
        model = Transformer(config).eval()
    sizes = [height * width for height, width in grids]
    cache = KVCache(batch=rows, layers=config.num_layers, capacity=prompt + sum(sizes))
    code_head_VD = model.head.weight[config.vocabulary.code_offset :]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for block, size in enumerate([prompt + 1, *sizes[1:]]):
            # The prompt counts as one block, with all pairs of its positions: a mask cannot be on meta.
            cache.begin(torch.full((rows, size), block), [size] * rows)
            x_BNW = torch.empty(rows, size, config.width, device="meta")
            if block:
                x_BNW = model.connector(torch.empty(rows, size, config.code_dim, device="meta"))
            hidden_BNW = model.step(x_BNW, torch.empty(3, rows, size, device="meta"), cache)
            predicted_BNW = hidden_BNW if block else hidden_BNW[:, -1:]
            torch.nn.functional.linear(predicted_BNW, code_head_VD)
    return counter.get_total_flops()


def counted_mmdit(width: int, layers: int, rows: int) -> int:
    """One denoising step."""
    try:
        from diffusers import SD3Transformer2DModel
    except ImportError:
        sys.exit("this benchmark compares with diffusers' MMDiT: pip install diffusers")
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=2 * LATENT_SIDE,
            patch_size=2,
            num_layers=layers,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=width // HEAD_DIM,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=width,
            pos_embed_max_size=2 * LATENT_SIDE,
        ).eval()
        inputs = {
            "hidden_states": torch.empty(rows, 16, 2 * LATENT_SIDE, 2 * LATENT_SIDE),
            "encoder_hidden_states": torch.empty(rows, TEXT_TOKENS, TEXT_WIDTH),
            "pooled_projections": torch.empty(rows, 2048),
            "timestep": torch.empty(rows),
        }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--steps", type=int, nargs="+", default=[28, 18], help="denoising steps of the MMDiT")
    parser.add_argument("--prompt", type=int, default=100, help="text ids of our prompt")
    options = parser.parse_args()
    changes = {"width": options.width, "num_layers": options.layers, "num_heads": options.width // HEAD_DIM}
    changes["mlp_width"] = round(options.width * 18944 / 3584)
    config = TransformerConfig.qwen2_5_vl_7b(codebook_size=CODES, **changes)
    grids = ScaleSchedule.nextflow().grids(1024)

    model = FlopsModel(shape=DecoderShape.of(config), vocabulary_size=CODES)
    work = sum(generation_work(grids, prompt=1 + options.prompt), Work())
    print(f"{'':<34}{'plain (TFLOPs)':>16}{'guided':>10}{'times ours':>12}{'guided':>9}")
    ours = [counted_image(config, grids, 1 + options.prompt, rows) / 1e12 for rows in (1, 2)]
    print(f"{'ours, 18 scales, counted':<34}{ours[0]:>16.1f}{ours[1]:>10.1f}")
    print(f"{'ours, by nextflow.sequence.flops':<34}{model.forward(work).total / 1e12:>16.1f}")
    once = [counted_mmdit(options.width, options.layers, rows) / 1e12 for rows in (1, 2)]
    for steps in options.steps:
        theirs = [steps * flops for flops in once]
        print(
            f"{f'MMDiT, {steps} steps, counted':<34}{theirs[0]:>16.1f}{theirs[1]:>10.1f}"
            f"{theirs[0] / ours[0]:>12.2f}{theirs[1] / ours[1]:>9.2f}"
        )

    print("\nThe paper's formula for a layer, 12 s_q h^2 + 4 s_q s_kv h, on both sides (TFLOPs of all layers):")
    formula = options.layers * paper_generation_flops(grids, width=options.width) / 1e12
    print(f"{'ours, 18 scales':<34}{formula:>16.1f}")
    for steps in options.steps:
        tokens = LATENT_SIDE**2
        theirs_formula = options.layers * steps * paper_flops(tokens, tokens, width=options.width) / 1e12
        print(f"{f'MMDiT, {steps} steps':<34}{theirs_formula:>16.1f}{'':>10}{theirs_formula / formula:>12.2f}")


if __name__ == "__main__":
    main()
