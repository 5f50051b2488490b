"""Next-scale generation against raster scan, against no cache, and text against transformers' `generate`.

    python benchmarks/generation.py raster --level 512 --pictures 1
    python benchmarks/generation.py cache --level 256
    python benchmarks/generation.py text
    python benchmarks/generation.py breakdown --level 1024
    python benchmarks/generation.py bound --level 512 --clock cpu --threads 1

One transformer with random weights, of about 100M parameters: speed does not depend on what they are.
raster      the same blocks, head and final grid, one code after another in raster order, keys and values cached in one
            preallocated buffer; each code is drawn from the head's rows of codes. `--tokens` runs some of the grid's tokens,
            behind caches of evenly spread lengths, and says so; the whole is then the sum over the grid of a line through
            the fastest of each eight, which favours raster.
cache       the same engine that feeds every row from its beginning at each scale.
text        transformers' Qwen2.5 with equal weights, `generate` with its default cache, the same ids.
breakdown   seconds of each scale and of the image tokenizer's decoder.
bound       what raster's ratio would be if there were nothing but products with the weights: of one position (per picture),
            for each token of raster, and at the rate of 256 positions for every position of next scale.
Both sides of a comparison run in this process and take turns; the fastest round of each counts. `--clock cpu --threads 1`
counts the seconds that the processor worked, which stay comparable on a machine that has other things to do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nextflow.generation.cache import KVCache
from nextflow.generation.engine import Decoding, GenerationRequest
from nextflow.generation.sampling import Rule, SamplingConfig, sample
from nextflow.kernels.linear import linear
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.scales import ScaleSchedule, num_codes_of

PROMPT = 16
SCHEDULE = ScaleSchedule.nextflow()
Result = TypeVar("Result")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Run the comparison that was asked for and print its table."""
    options = _parse()
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    with torch.device(options.device):
        transformer = Transformer(_config(options)).eval().to(dtype)
    run = {"raster": raster, "cache": without_cache, "text": text, "breakdown": breakdown, "bound": bound}[options.what]
    with torch.no_grad():
        Console(width=120).print(run(transformer, options))


def raster(transformer: Transformer, options: argparse.Namespace) -> Table:
    """Seconds of one batch of pictures, next scale and raster."""
    grids = SCHEDULE.grids(options.level)
    pixels = grids[-1][0] * grids[-1][1]
    tokens = min(options.tokens or pixels, pixels)
    seconds: dict[str, float] = {}
    for _ in range(options.repeats):
        _fastest(seconds, "next scale", lambda: _draw(Decoding, transformer, options), options)
    seconds["raster"] = _raster(transformer, options, pixels, tokens)
    table = _table(
        transformer, options, f"{num_codes_of(grids):,} codes in {len(grids)} steps against {pixels:,} in {pixels:,}"
    )
    for column in ("side", "seconds", "seconds / picture", "ratio"):
        table.add_column(column, justify="right")
    note = "" if tokens == pixels else f" (line through {tokens} of {pixels} tokens)"
    for name, value in seconds.items():
        ratio = value / seconds["next scale"]
        table.add_row(
            name + (note if name == "raster" else ""), f"{value:.2f}", f"{value / options.pictures:.2f}", f"{ratio:.2f}"
        )
    return table


def without_cache(transformer: Transformer, options: argparse.Namespace) -> Table:
    """Seconds with the cache, and feeding every row again."""
    seconds: dict[str, float] = {}
    codes: dict[str, Tensor] = {}
    for _ in range(options.repeats):
        for name, engine in (("KV cache", Decoding), ("recomputed", Recomputing)):
            codes[name] = _fastest(seconds, name, partial(_draw, engine, transformer, options), options)
    agreement = (codes["KV cache"] == codes["recomputed"]).float().mean().item()
    table = _table(transformer, options, f"codes that agree: {agreement:.2%}")
    for column in ("side", "seconds", "ratio"):
        table.add_column(column, justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}", f"{value / seconds['KV cache']:.2f}")
    return table


def text(transformer: Transformer, options: argparse.Namespace) -> Table:
    """Seconds of greedy text, ours and transformers'."""
    theirs = _hugging_face(transformer)
    prompt = torch.arange(2, 2 + PROMPT)
    ids_BL = torch.cat([torch.tensor([0]), prompt]).expand(options.pictures, -1)
    request = GenerationRequest(
        segments=(TextSegment(ids=prompt.tolist()),), task="text", max_text_tokens=options.new_ids
    )
    drawn: dict[str, list[int]] = {}

    def ours() -> None:
        decoding = Decoding(
            transformer, [request] * options.pictures, layout=LayoutConfig(), sampling=SamplingConfig(greedy=True)
        )
        while decoding.active:
            decoding.step()
        drawn["ours"] = list(decoding.jobs[0].result(()).text_ids)

    def hugging_face() -> None:
        options_ = {"do_sample": False, "min_new_tokens": options.new_ids, "max_new_tokens": options.new_ids}
        drawn["transformers"] = theirs.generate(ids_BL, **options_, pad_token_id=1)[0, ids_BL.shape[1] :].tolist()

    seconds: dict[str, float] = {}
    for _ in range(options.repeats):
        _fastest(seconds, "ours", ours, options)
        _fastest(seconds, "transformers", hugging_face, options)
    same = sum(a == b for a, b in zip(drawn["ours"], drawn["transformers"]))
    table = _table(transformer, options, f"{options.new_ids} ids each, greedy; {same} of {options.new_ids} are equal")
    for column in ("side", "seconds", "ids / s", "ratio"):
        table.add_column(column, justify="right")
    for name, value in seconds.items():
        rate = options.pictures * options.new_ids / value
        table.add_row(name, f"{value:.2f}", f"{rate:.1f}", f"{value / seconds['ours']:.2f}")
    return table


def breakdown(transformer: Transformer, options: argparse.Namespace) -> Table:
    """Seconds of every scale, and of decoding the codes to pixels."""
    grids = SCHEDULE.grids(options.level)
    decoding = Decoding(transformer, _requests(options), layout=LayoutConfig(), sampling=SamplingConfig())
    tokenizer = _tokenizer(transformer)
    steps = []
    while decoding.active:
        steps.append(_seconds(lambda: decoding.step(), options))
    codes_BN = torch.stack([job.pictures[-1] for job in decoding.jobs])
    steps.append(_seconds(lambda: tokenizer.decode(codes_BN, grids), options))
    table = _table(transformer, options, f"{sum(steps):.2f} s in all")
    for column in ("step", "cells", "seconds", "share"):
        table.add_column(column, justify="right")
    names = [f"scale {height} x {width}" for height, width in grids] + ["tokenizer's decoder"]
    cells = [str(height * width) for height, width in grids] + [""]
    for name, count, value in zip(names, cells, steps):
        table.add_row(name, count, f"{value:.3f}", f"{value / sum(steps):.1%}")
    return table


def bound(transformer: Transformer, options: argparse.Namespace) -> Table:
    """Seconds of the products with the weights alone, next scale and raster."""
    grids = SCHEDULE.grids(options.level)
    positions, pixels = num_codes_of(grids), grids[-1][0] * grids[-1][1]
    weights = [module.weight for module in transformer.blocks.modules() if isinstance(module, nn.Linear)]
    weights.append(transformer.head.weight[transformer.vocabulary.code_offset :])
    seconds: dict[str, float] = {}
    for count in (options.pictures, 256):
        inputs = {width: torch.randn(count, width).to(weights[0]) for width in {weight.shape[1] for weight in weights}}
        for _ in range(max(3, options.repeats)):
            run = partial(lambda inputs: [linear(inputs[weight.shape[1]], weight) for weight in weights], inputs)
            _fastest(seconds, str(count), run, options)
    numbers = sum(weight.numel() for weight in weights)
    one, many = seconds[str(options.pictures)], seconds["256"] / 256
    table = _table(transformer, options, f"{positions:,} positions against {pixels:,}; products with the weights alone")
    for column in ("side", "rate", "seconds", "ratio"):
        table.add_column(column, justify="right")
    whole = positions * many * options.pictures
    table.add_row("next scale", f"{2 * numbers / many / 1e9:.0f} GFLOP/s", f"{whole:.2f}", "1.00")
    rate = f"{numbers * weights[0].element_size() / one / 1e9:.1f} GB/s"
    table.add_row("raster", rate, f"{pixels * one:.2f}", f"{pixels * one / whole:.2f}")
    return table


class Recomputing(Decoding):
    """The engine without a cache: every window is fed behind all earlier ones. Rows of equal prompts and grids alone."""

    def _forward(self, window, rows):
        self._past = [*getattr(self, "_past", []), (self.transformer.embed(window), window)]
        x_RND = torch.cat([x.expand(len(self._rows), -1, -1) for x, _ in self._past], dim=1)
        position_3RN = torch.cat([w.position_3BL.expand(-1, len(self._rows), -1) for _, w in self._past], dim=2)
        block_RN = torch.cat([w.block_BL.expand(len(self._rows), -1) for _, w in self._past], dim=1)
        fresh = KVCache(batch=len(x_RND), layers=self.transformer.config.num_layers, capacity=x_RND.shape[1])
        fresh.begin(block_RN, [x_RND.shape[1]] * len(x_RND))
        hidden_RND = self.transformer.step(x_RND, position_3RN, fresh)
        self.cache = fresh
        fresh.select = lambda rows: None  # rows are expanded here
        return hidden_RND[: len(window.counts), -window.block_BL.shape[1] :]


def _raster(transformer: Transformer, options: argparse.Namespace, pixels: int, tokens: int) -> float:
    """Seconds of a batch of pictures, code after code, or a line through `tokens` of them."""
    pictures, now = options.pictures, CLOCKS[options.clock]
    cache = KVCache(batch=pictures, layers=transformer.config.num_layers, capacity=PROMPT + 2 + pixels)
    prompt_BL = torch.arange(2, 2 + PROMPT).expand(pictures, -1)
    generator = torch.Generator().manual_seed(0)

    def feed(x_BNW: Tensor, start: int) -> Tensor:
        count = x_BNW.shape[1]
        position_3BN = torch.arange(start, start + count).float().expand(3, pictures, -1)
        cache.begin(torch.arange(start, start + count).expand(pictures, -1), [count] * pictures)
        hidden_BW = transformer.step(x_BNW, position_3BN, cache)[:, -1]
        logits_BV = transformer.code_logits(hidden_BW).float()
        return sample(logits_BV, torch.rand(pictures, generator=generator), Rule()).index_M

    def embed(code_B: Tensor) -> Tensor:
        return transformer.connector(transformer.code_embedding(code_B))[:, None]

    if tokens == pixels:
        started = now()
        code_B = feed(transformer.embed_tokens(prompt_BL), 0)
        for token in range(1, pixels):
            code_B = feed(embed(code_B), PROMPT + token - 1)
        return now() - started
    # Groups of 8 tokens behind caches of evenly spread lengths; the fastest of each group counts.
    lengths = torch.linspace(PROMPT, PROMPT + pixels - 8, max(2, tokens // 8)).long().tolist()
    feed(embed(torch.zeros(pictures, dtype=torch.int64)), 0)
    times = []
    for length in lengths:
        cache._lengths = [length] * pictures
        code_B = torch.zeros(pictures, dtype=torch.int64)
        rounds = []
        for token in range(8):
            started = now()
            code_B = feed(embed(code_B), length + token)
            rounds.append(now() - started)
        times.append(min(rounds))
    # Least squares of seconds over length, summed over the grid.
    design = torch.stack([torch.ones(len(lengths)), torch.tensor(lengths).float()], dim=1)
    base, slope = torch.linalg.lstsq(design, torch.tensor(times)[:, None]).solution.squeeze(1).tolist()
    return sum(base + slope * (PROMPT + token) for token in range(pixels))


def _draw(engine: type[Decoding], transformer: Transformer, options: argparse.Namespace) -> Tensor:
    decoding = engine(transformer, _requests(options), layout=LayoutConfig(), sampling=SamplingConfig())
    while decoding.active:
        decoding.step()
    return torch.stack([job.pictures[-1] for job in decoding.jobs]).cpu()


def _requests(options: argparse.Namespace) -> list[GenerationRequest]:
    segments = (TextSegment(ids=list(range(2, 2 + PROMPT))),)
    grids = SCHEDULE.grids(options.level)
    return [
        GenerationRequest(segments=segments, grids=grids, seed=seed, guidance=options.guidance)
        for seed in range(options.pictures)
    ]


def _tokenizer(transformer: Transformer):
    from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
    from nextflow.models.tokenizer.model import Tokenizer

    pixel_dim = transformer.config.code_dim
    return Tokenizer(
        TokenizerConfig(
            schedule=SCHEDULE, codebook_size=transformer.config.codebook_size, pixel_dim=pixel_dim, semantic=None,
            pixel=PixelConfig(),
        )
    ).eval()  # fmt: skip


def _hugging_face(transformer: Transformer):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from nextflow.models.transformer.state_dict import to_qwen2_5_vl

    c = transformer.config
    config = Qwen2Config(
        vocab_size=c.text_size, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, max_position_embeddings=4096,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().to(transformer.norm.weight.dtype)
    weights = to_qwen2_5_vl(transformer.state_dict(), c)
    model.load_state_dict({name.replace("model.language_model.", "model."): value for name, value in weights.items()})
    return model


def _fastest(seconds: dict[str, float], name: str, run: Callable[[], Result], options: argparse.Namespace) -> Result:
    """What `run` gives; notes its seconds when no earlier round of that name was faster."""
    now = CLOCKS[options.clock]
    started = now()
    result = run()
    value = now() - started
    seconds[name] = min(value, seconds.get(name, value))
    return result


def _seconds(run: Callable[[], object], options: argparse.Namespace) -> float:
    seconds: dict[str, float] = {}
    _fastest(seconds, "run", run, options)
    return seconds["run"]


def _table(transformer: Transformer, options: argparse.Namespace, note: str) -> Table:
    parameters = sum(parameter.numel() for parameter in transformer.parameters()) / 1e6
    what = "text" if options.what == "text" else f"level {options.level}, guidance {options.guidance:g}"
    precision = "bfloat16" if options.bf16 else "float32"
    return Table(
        title=f"{options.what}: {parameters:.0f}M parameters, batch {options.pictures}, {what}, {options.device} "
        f"({torch.get_num_threads()} threads), {precision}, {options.clock} seconds\n{note}"
    )


def _config(options: argparse.Namespace) -> TransformerConfig:
    width = options.width
    return TransformerConfig(
        text_size=options.text_size, codebook_size=options.codebook_size, start_id=0, end_id=1, code_dim=40, width=width,
        num_layers=options.layers, num_heads=width // 64, num_kv_heads=max(1, width // 256), head_dim=64,
        mlp_width=width * 4, rope_sections=(8, 12, 12),
    )  # fmt: skip


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["raster", "cache", "text", "breakdown", "bound"])
    parser.add_argument("--level", type=int, default=256, choices=sorted(SCHEDULE.levels), help="256")
    parser.add_argument("--pictures", type=int, default=1, help="pictures (or texts) in the one batch: 1")
    parser.add_argument("--guidance", type=float, default=0.0, help="0 has half the rows")
    parser.add_argument("--tokens", type=int, default=0, help="raster: tokens that are run; 0 runs all")
    parser.add_argument("--new-ids", type=int, default=64, help="text: ids that are written")
    parser.add_argument("--width", type=int, default=768, help="of the transformer, a multiple of 256")
    parser.add_argument("--layers", type=int, default=10, help="of the transformer")
    parser.add_argument("--text-size", type=int, default=4096, help="text ids")
    parser.add_argument("--codebook-size", type=int, default=16384, help="codes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--repeats", type=int, default=1, help="rounds")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves PyTorch's choice")
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS, help="wall, or cpu: seconds that the processor worked"
    )
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
