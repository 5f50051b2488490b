"""One rank of `test_sharding.py`: `python tokenizer_ranks.py FOLDER`, with its rank in the environment.

Rank r takes its share of every batch. What it logged, its codes and pictures come back, and rank 0 saves checkpoints.
"""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from nextflow.callbacks.fsdp_sharding import FSDPSharding
from nextflow.lightning_modules.tokenizer import TokenizerModule, to_signed
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig
from nextflow.models.tokenizer.losses import LossWeights
from nextflow.sequence.scales import ScaleSchedule

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8)
PIXEL = PixelConfig(layout="patchified", width=8, multipliers=(1, 2), num_blocks=1, stem=4, latent_width=16, groups=4)
CONFIG = TokenizerConfig(
    schedule=SCHEDULE,
    codebook_size=32,
    semantic_dim=8,
    pixel_dim=4,
    pixel=PIXEL,
    semantic=SemanticConfig(decoder_layers=1, decoder_width=16, decoder_heads=2),
    revive_interval=2,
    revive_below=0.5,
    usage_decay=0.5,
)
WRAP = [
    "nextflow.models.tokenizer.pixel.PixelEncoder",
    "nextflow.models.tokenizer.pixel.PixelDecoder",
    "nextflow.models.tokenizer.semantic.SemanticDecoder",
    "transformers.models.siglip2.modeling_siglip2.Siglip2EncoderLayer",
]
LOSSES = LossWeights(adversarial=0.5, adaptive_adversarial=True, entropy=0.1, residual=1.0)


def whole_batch(index):
    level = (32, 16)[index % 2]
    images = torch.rand(8, 3, level, level, generator=torch.Generator().manual_seed(index)) * 255
    grids = SCHEDULE.grids(level)
    return SimpleNamespace(images=images.byte(), grids=grids, level=level, split="train", keys=list("abcdefgh"))


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        batch = whole_batch(index)
        batch.images, batch.keys = batch.images.chunk(RANKS)[RANK], batch.keys[RANK * 8 // RANKS :][: 8 // RANKS]
        return batch


class Record(L.Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *args):
        logged = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
        self.steps.append({key: value.detach().clone() for key, value in logged.items()})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def trainer(strategy, record, steps, folder_of_shards=False, **sharding):
    callbacks = [record]
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=folder_of_shards)
        callbacks.append(FSDPSharding(wrap=WRAP, **sharding))
    return L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_steps=steps,
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def module(folder, stage="joint", update="gradient", optimizer=sgd, **options):
    L.seed_everything(0, verbose=False)
    made = TokenizerModule(
        replace(CONFIG, codebook_update=update),
        stage=stage,
        semantic_encoder=f"{folder}/siglip2",
        generator_optimizer=optimizer,
        discriminator_optimizer=optimizer,
        discriminator=DiscriminatorConfig(width=8, num_layers=1, groups=4),
        total_steps=8,
        gradient_clip=0.2,  # below the norms met here
        **options,
    )
    with torch.no_grad():
        for part in (made.tokenizer.quantizer, made.discriminator):
            for parameter in [] if part is None else part.parameters():
                parameter += RANK  # rank 0's values count
    return made


def fit(folder, name, made, strategy, steps, ckpt_path=None, **sharding):
    record, loader = Record(), torch.utils.data.DataLoader(Batches(), batch_size=None)
    running = trainer(strategy, record, steps, **sharding)
    running.fit(made, loader, loader, ckpt_path=ckpt_path)
    running.save_checkpoint(f"{folder}/{RANKS}_{name}.ckpt")
    batch = Batches()[0]
    made.eval()
    codes = made.tokenizer.encode(to_signed(batch.images), batch.grids).target_codes_BN
    return {
        "steps": record.steps,
        "validation": {key: value for key, value in running.callback_metrics.items() if key.startswith("val/")},
        "entries": made.tokenizer.quantizer.entries_KC().detach(),
        "codes": codes,
        "decoded": made.tokenizer.decode(codes, batch.grids).detach(),
    }


def main(folder):
    results = {}
    for strategy in ("ddp", "fsdp") if RANKS > 1 else ("auto",):
        joint = module(folder, losses=LOSSES, discriminator_start=2)  # with a discriminator
        results[f"{strategy}_joint"] = fit(folder, f"{strategy}_joint", joint, strategy, 4)
        pixel = module(folder, "pixel", "ema")  # without, its codebook by running means
        results[f"{strategy}_pixel"] = fit(folder, f"{strategy}_pixel", pixel, strategy, 3)
    if RANKS > 1:
        options = {"losses": LOSSES, "discriminator_start": 1, "optimizer": adam}
        # one file after 2 steps, and a folder of shards after 4
        for name, steps, start in (
            ("straight", 6, None),
            ("file", 2, None),
            ("shards", 4, "file"),
            ("end", 6, "shards"),
        ):
            path = None if start is None else f"{folder}/2_{start}.ckpt"
            made = module(folder, "pixel", **options)
            results[name] = fit(folder, name, made, "fsdp", steps, path, folder_of_shards=name == "shards")
        plan = {"activation_checkpointing": True, "param_dtype": "bfloat16", "reduce_dtype": "float32"}
        results["bfloat16"] = fit(folder, "bfloat16", module(folder, **options), "fsdp", 2, **plan)
    return results


if __name__ == "__main__":
    torch.save(main(sys.argv[1]), f"{sys.argv[1]}/{RANK}.pt")
