"""One rank of `test_pretraining_ranks.py`: `python pretraining_ranks.py FOLDER`, with its rank in the environment.

Every rank takes its share of the documents of a batch, the first rank the larger one; one process takes them all.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from nextflow.callbacks.ema import EMA
from nextflow.callbacks.fsdp_sharding import FSDPSharding
from nextflow.callbacks.last_checkpoint import LastCheckpoint
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.transformer.config import DecoderConfig
from nextflow.sequence.documents import Document, ImageSegment, TextSegment
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import PackedRows, lay_out
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.text_tokenizer import train_text_tokenizer

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8, base_grids=((2, 8), (4, 4), (8, 2)))
DECODER = DecoderConfig(
    width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, rope_sections=(2, 1, 1), max_scales=4
)
CODES = 17
WRAP = ["nextflow.models.transformer.block.Block", "nextflow.models.transformer.head.SingleHead"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The part of PackedBatch that the module reads."""

    rows: PackedRows
    images: tuple = ()
    level: int = 32

    def to(self, device, non_blocking=False):
        return replace(self, rows=self.rows.to(device))


def prepare(folder):
    """The tokenizers that every run needs."""
    train_text_tokenizer(["a red dog", "two blue cats"], Path(folder) / "text", size=300)
    pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
    config = TokenizerConfig(schedule=SCHEDULE, codebook_size=CODES, pixel_dim=4, semantic=None, pixel=pixel)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    trainer.strategy.connect(TokenizerModule(config, stage="pixel"))
    trainer.save_checkpoint(f"{folder}/tokenizer.ckpt")


def documents(index):
    """Five: texts of growing length, three of them with an image; of every third batch rank 1 gets texts alone."""
    generator = torch.Generator().manual_seed(index)
    made = []
    for number in range(5):
        text = TextSegment(ids=torch.randint(2, 250, (3 + 2 * number,), generator=generator).tolist())
        grids = SCHEDULE.grids(32, (1.0, 0.25)[number % 2])
        codes = torch.randint(0, CODES, (sum(h * w for h, w in grids),), generator=generator)
        picture = (ImageSegment(grids=grids, codes=codes),) if number < 3 or index % 3 else ()
        made.append(Document(segments=(text, *picture)))
    return made


class Batches(torch.utils.data.Dataset):
    def __init__(self, vocabulary, start=0, stop=100):
        self.vocabulary, self.start, self.stop = vocabulary, start, stop

    def __len__(self):
        return self.stop - self.start

    def __getitem__(self, index):
        made = documents(self.start + index)
        if RANKS == 2:
            made = (made[:3], made[3:])[RANK]
        return Batch(rows=lay_out([[document] for document in made], self.vocabulary, LayoutConfig(alpha=0.9)))


class Record(L.Callback):
    """What each optimiser step and each validation logged."""

    def __init__(self):
        self.steps, self.validations, self.sharded = [], [], False

    def on_train_batch_end(self, trainer, module, *args):
        wanted = ("train/loss", "train/gradient_norm", "train/loss_image/scale_02", "train/accuracy/text")
        logged = {name: trainer.callback_metrics[name] for name in wanted if name in trainer.callback_metrics}
        self.steps.append({name: torch.as_tensor(value).clone() for name, value in logged.items()})
        self.sharded = all(isinstance(parameter, DTensor) for parameter in module.parameters())

    def on_validation_end(self, trainer, module):
        self.validations.append(trainer.callback_metrics["val/loss"].clone())


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.5, momentum=0.9)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3, fused=True)


def make(folder, seed=0, **changes):
    L.seed_everything(seed + (1000 * RANK if RANKS > 1 else 0), verbose=False)  # rank 0's state counts
    options = {
        "transformer": DECODER,
        "tokenizer": f"{folder}/tokenizer.ckpt",
        "text_tokenizer": f"{folder}/text",
        "optimizer": sgd,
        "total_steps": 12,
    }
    return PretrainingModule(**{**options, **changes})


def fit(folder, name, module, strategy, steps, start=0, resume=None, ema=True, shards=False, **options):
    record = Record()
    callbacks = [record, EMA(decay=0.8, warmup=1.0)] if ema else [record]
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=shards)
        plan = {name: options.pop(name) for name in ("wrap", "activation_checkpointing", "compile") if name in options}
        callbacks.append(FSDPSharding(**{"wrap": WRAP, **plan}))
    if shards:
        callbacks.append(LastCheckpoint(f"{folder}/{name}", every_n_train_steps=2))
    accumulate = options.get("accumulate_grad_batches", 1)
    trainer = L.Trainer(
        **{"accelerator": "cpu", "devices": RANKS, "gradient_clip_val": 0.5, "val_check_interval": 2, **options},
        strategy=strategy,
        max_steps=steps,
        callbacks=callbacks,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=shards,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    training = torch.utils.data.DataLoader(Batches(module.config.vocabulary, start * accumulate), batch_size=None)
    validation = torch.utils.data.DataLoader(Batches(module.config.vocabulary, 0, 2), batch_size=None)
    trainer.fit(module, training, validation, ckpt_path=resume)
    if not shards:
        trainer.save_checkpoint(f"{folder}/{name}.ckpt")
    return {"steps": record.steps, "validations": record.validations, "sharded": record.sharded}


def main(folder):
    results, n = {}, RANKS
    for strategy in ("ddp", "fsdp") if RANKS > 1 else ("auto",):
        results[f"{strategy}_all"] = fit(
            folder, f"{n}_{strategy}_all", make(folder), strategy, 4, accumulate_grad_batches=2
        )
        alignment = make(
            folder, trainable="alignment", initialize_from=f"{folder}/start.ckpt", initialize_weights="ema"
        )
        plan = {"activation_checkpointing": True} if strategy == "fsdp" else {}
        results[f"{strategy}_alignment"] = fit(folder, f"{n}_{strategy}_alignment", alignment, strategy, 2, **plan)
    # interrupted after 2 steps and, across numbers of processes and kinds of checkpoint, after 4
    runs = [("straight", 0, 6, None, False), ("file", 0, 2, None, False)]
    if RANKS > 1:
        runs += [
            ("shards", 2, 4, "2_file.ckpt", True),
            ("end", 4, 6, "2_shards/last.ckpt", False),
            ("from_one", 2, 6, "1_file.ckpt", False),
        ]
    for name, start, stop, resume, shards in runs:
        resume = None if resume is None else f"{folder}/{resume}"
        results[name] = resumed(folder, f"{n}_{name}", "fsdp" if RANKS > 1 else "auto", start, stop, resume, shards)
    return results


def resumed(folder, name, strategy, start, stop, resume, shards=False, **changes):
    """Steps `start` to `stop` of the same run."""
    return fit(folder, name, make(folder, optimizer=adamw, **changes), strategy, stop, start, resume, shards=shards)


if __name__ == "__main__":
    torch.save(main(sys.argv[1]), f"{sys.argv[1]}/{RANK}.pt")
