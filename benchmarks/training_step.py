"""A training step of our Transformer against transformers' Qwen2.5-VL text model: same weights, same packs, in one run.

    python benchmarks/training_step.py [--levels 256 512] [--dtype bfloat16 float32] [--width 512] [--layers 6] [--rounds 2]

Claim: forward and backward at least 1.3 times faster, with at most half the memory.

    transformers    Qwen2_5_VLTextModel with sdpa and a dense mask (made once, outside the clock), plain cross-entropy on logits
    nextflow        Transformer and its `cross_entropy`, everything on `auto`

Both are fed by our embeddings of a pack (Hugging Face's model knows no image codes) and end in the same head, weights of ours
converted by `models/transformer/state_dict.py`. Packs are of the paper's schedule, several documents each: text to image, image
to text, interleaved, and text alone. Every side runs in a process of its own, in turns, the fastest round of each counts. Time
is of the processor, one thread, since other load on the machine only ever adds; memory is the peak of resident memory above
what was there before the step, so that it holds activations, logits and all gradients. Then losses and gradients are compared.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextflow.kernels.visibility import hidden_bias
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.models.transformer.state_dict import to_qwen2_5_vl
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import PackedRows, lay_out
from nextflow.sequence.scales import ScaleSchedule

PREFIX = "model.language_model."
SIDES = ("transformers", "nextflow")
# Documents of a pack: numbers of text ids, and "p" for a picture of the level.
PACKS: dict[int, tuple[tuple[int | str, ...], ...]] = {
    256: ((64, "p"), ("p", 64), (64, "p", 64, "p"), (200,)),
    512: ((64, "p"), ("p", 64), (200,)),
}


def main() -> None:
    """Run both sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, nargs="+", choices=tuple(PACKS), default=list(PACKS))
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--text_size", type=int, default=16_384)
    parser.add_argument("--codebook_size", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help="run this one alone, in this process, and print JSON")
    parser.add_argument("--output", type=Path, help="where a side saves its gradients")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(step(options.side, options.levels[0], options.dtype[0], options)))
        return
    print(
        f"width {options.width}, {options.layers} layers, {options.text_size} text ids and {options.codebook_size} codes"
    )
    columns = f"{'level':>5}{'length':>7}{'dtype':>9}  {'side':13}{'forward s':>10}{'backward s':>11}"
    print(f"{columns}{'faster':>8}{'peak MB':>9}{'memory':>8}{'loss':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for level in options.levels:
            for dtype in options.dtype:
                compare(level, dtype, options, Path(folder))


def compare(level: int, dtype: str, options: argparse.Namespace, folder: Path) -> None:
    """Both sides in turns; prints their rows and how far results are apart."""
    rounds: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(options.rounds):
        for side in SIDES:
            rounds[side].append(in_child(side, level, dtype, options, folder / f"{side}.pt"))
    best = {
        side: {name: min(values[name] for values in of_side) for name in of_side[0]} for side, of_side in rounds.items()
    }
    theirs = best["transformers"]
    for side, ours in best.items():
        faster = (theirs["forward"] + theirs["backward"]) / (ours["forward"] + ours["backward"])
        print(
            f"{level:>5}{ours['length']:>7.0f}{dtype:>9}  {side:13}{ours['forward']:>10.2f}{ours['backward']:>11.2f}"
            f"{faster:>8.2f}{ours['peak']:>9.0f}{ours['peak'] / theirs['peak']:>8.2f}{ours['loss']:>9.4f}",
            flush=True,
        )
    gradients = [torch.load(folder / f"{side}.pt") for side in SIDES]
    assert gradients[0].keys() == gradients[1].keys()
    apart = {name: float((gradients[1][name] - value).norm() / value.norm()) for name, value in gradients[0].items()}
    worst = max(apart, key=apart.__getitem__)
    print(f"{'':23}gradients: {len(apart)} compared, at most {apart[worst]:.1e} apart (relative norm; {worst})")


def in_child(side: str, level: int, dtype: str, options: argparse.Namespace, output: Path) -> dict:
    """One step in a process of its own, so that each begins with the same memory."""
    arguments = ["--side", side, "--levels", str(level), "--dtype", dtype, "--output", str(output)]
    for name in ("width", "layers", "text_size", "codebook_size"):
        arguments += [f"--{name}", str(getattr(options, name))]
    result = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def step(side: str, level: int, dtype: str, options: argparse.Namespace) -> dict:
    """Forward and backward of one side: seconds, peak memory in MB, mean loss. Gradients go to `options.output`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads, kv_heads = options.width // 64, options.width // 256
    config = TransformerConfig(
        width=options.width, num_layers=options.layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=64,
        mlp_width=4 * options.width, rope_sections=(8, 12, 12), text_size=options.text_size,
        codebook_size=options.codebook_size, code_dim=40, start_id=0, end_id=1,
    )  # fmt: skip
    ours = Transformer(config)
    theirs = None if side == "nextflow" else qwen2_5_vl(ours)
    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    torch.manual_seed(0)  # the same documents for both
    # A tiny pack first: libraries load, and what they allocate once is nobody's.
    for parts in (((8,), (8,)), PACKS[level]):
        rows = pack(parts, level, config)
        bias_B1LL = hidden_bias(rows.visible_BLL()[:, None], torch.float32)
        ours.zero_grad()
        if theirs is not None:
            theirs.zero_grad()
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
        before, started = resident("VmRSS"), time.process_time()
        with autocast:
            loss = our_loss(ours, rows) if theirs is None else their_loss(ours, theirs, rows, bias_B1LL)
        between = time.process_time()
        loss.backward()
        ended = time.process_time()
        peak = (resident("VmHWM") - before) / 1e6
    torch.save(gradients(ours, theirs), options.output)
    return {
        "forward": between - started,
        "backward": ended - between,
        "peak": peak,
        "loss": loss.item(),
        "length": rows.ids_BL.shape[1],
    }


def our_loss(model: Transformer, rows: PackedRows) -> Tensor:
    """Weighted mean cross-entropy, as `PretrainingModule` computes it."""
    return model.cross_entropy(model(rows), rows.target_BL, rows.weight_BL).total / rows.num_targets


def their_loss(ours: Transformer, theirs: nn.Module, rows: PackedRows, bias_B1LL: Tensor) -> Tensor:
    """The same from transformers' decoder, our embeddings and head around it."""
    hidden_BLW = theirs(
        inputs_embeds=ours.embed(rows),
        attention_mask={"full_attention": bias_B1LL},
        position_ids=rows.position_3BL,
        use_cache=False,
    ).last_hidden_state
    logits_NV = ours.head(hidden_BLW).flatten(0, 1).float()
    loss_N = F.cross_entropy(logits_NV, rows.target_BL.flatten(), reduction="none")
    return (loss_N * rows.weight_BL.flatten()).sum() / rows.num_targets


def qwen2_5_vl(ours: Transformer) -> nn.Module:
    """transformers' text model with the weights of ours."""
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    config = ours.config
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, "mrope_section": list(config.rope_sections)}
    model = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=config.text_size, hidden_size=config.width, intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps, bos_token_id=0, eos_token_id=1,
            rope_parameters=rope, attn_implementation="sdpa",
        )
    ).train()  # fmt: skip
    state = to_qwen2_5_vl(ours.state_dict(), config)
    del state["lm_head.weight"]
    model.load_state_dict({key.removeprefix(PREFIX): value for key, value in state.items()})
    for name in ("blocks", "norm"):  # ours would only weigh on memory
        setattr(ours, name, nn.Identity())
    return model


def gradients(ours: Transformer, theirs: nn.Module | None) -> dict[str, Tensor]:
    """Under Hugging Face's names for the decoder and ours for what is around it."""
    around = {name: value.grad for name, value in ours.named_parameters() if not name.startswith(("blocks.", "norm."))}
    if theirs is None:
        found = {name: value.grad for name, value in ours.named_parameters()}
        decoder = to_qwen2_5_vl(found, ours.config)
        return {**around, **{name: decoder[name] for name in decoder if ".layers." in name or ".norm." in name}}
    decoder = {PREFIX + name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    return {**around, **decoder}


def pack(documents: tuple[tuple[int | str, ...], ...], level: int, config: TransformerConfig) -> PackedRows:
    """One row of random documents."""
    grids = ScaleSchedule.nextflow().grids(level)
    num_codes = sum(height * width for height, width in grids)

    def segment(part: int | str) -> TextSegment | ImageSegment:
        if isinstance(part, int):
            return TextSegment(ids=torch.randint(2, config.text_size, (part,)).tolist())
        return ImageSegment(grids=grids, codes=torch.randint(0, config.codebook_size, (num_codes,)))

    made = [Document(segments=tuple(segment(part) for part in parts)) for parts in documents]
    return lay_out([made], config.vocabulary, LayoutConfig(alpha=0.0 if level == 256 else 0.9))


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
