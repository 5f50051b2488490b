"""Resuming is exact: a run that was cut off and goes on in new processes against one that was not.

    python benchmarks/resume.py [--cells "2 fsdp2 3" ...]

The real PretrainingModule, an average of its weights, clipping and AdamW on packs of a mixture of three sources, 12 steps in
three stages of a curriculum: level 32 and alpha 0; level 64, alpha 0.9 and other sources; level 32 and alpha 0.5. The straight
run leaves checkpoints on its way; new processes go on from each and have to end where it ends. Cut off:

    boundary   after step 4, the last of a stage: the next batch has another level, alpha and mixture
    inside     after step 6, in the middle of a stage; the next boundary is still to come

A cell is a number of processes, a strategy and a number of loader workers. FSDP2 writes sharded checkpoints.

Claim: the largest difference of weights, average, optimiser state, and of what each step logged, is 0 on CPUs, on each rank.
The exit code is 1 where it is not.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from nextflow.callbacks.ema import EMA
from nextflow.callbacks.fsdp_sharding import FSDPSharding
from nextflow.callbacks.resolution_curriculum import ResolutionCurriculum, Stage
from nextflow.datamodules.arrangements import CaptionThenImage, ImageThenCaption
from nextflow.datamodules.mixture import MixtureDataModule, Source
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.transformer.config import DecoderConfig
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.shards import Codes, ShardHeader, ShardWriter, encode_codes
from nextflow.sequence.text_tokenizer import train_text_tokenizer

SCHEDULE = ScaleSchedule(
    sides=(1, 2, 3, 4, 5, 6, 8), levels={32: 4, 64: 7}, stride=8, base_grids=((4, 16), (8, 8), (16, 4))
)
NUM_CODES = 64
DECODER = DecoderConfig(
    width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, rope_sections=(2, 1, 1), max_scales=7
)
WRAP = ["nextflow.models.transformer.block.Block", "nextflow.models.transformer.head.SingleHead"]
STAGES = [
    Stage(level=32, num_batches=4, batch_size=2, mixture={"drawings": 2, "captions": 1}),
    Stage(level=64, num_batches=5, alpha=0.9, batch_size=1, mixture={"drawings": 1, "others": 3}),
    Stage(level=32, num_batches=3, alpha=0.5, batch_size=2),
]
CUTS = {"boundary": 4, "inside": 6}
STRATEGIES = {1: ("single", "fsdp2"), 2: ("ddp", "fsdp2")}
WORKERS = (0, 2, 3)
PARTS = ("weights", "average", "optimiser", "steps")


@dataclass(frozen=True)
class Cell:
    """A kind of run."""

    ranks: int
    strategy: str
    workers: int

    @classmethod
    def parse(cls, words: str) -> "Cell":
        """From "2 fsdp2 3". Raises ValueError for what does not exist."""
        ranks, strategy, workers = words.split()
        if strategy not in STRATEGIES.get(int(ranks), ()):
            raise ValueError(f"--cells {words}: strategies by number of processes are {STRATEGIES}")
        return cls(int(ranks), strategy, int(workers))

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.ranks}_{self.strategy}_{self.workers}"


ALL = [Cell(ranks, strategy, workers) for ranks in STRATEGIES for strategy in STRATEGIES[ranks] for workers in WORKERS]


def prepare(folder: Path) -> None:
    """Both tokenizers and token shards of two levels, for two sources."""
    pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
    config = TokenizerConfig(schedule=SCHEDULE, codebook_size=NUM_CODES, pixel_dim=4, semantic=None, pixel=pixel)
    module = TokenizerModule(config, stage="pixel")
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "tokenizer.ckpt")
    fingerprint = module.tokenizer.fingerprint()
    captions = []
    for level in SCHEDULE.levels:
        header = ShardHeader(kind="codes", schedule=SCHEDULE.to_dict(), tokenizer=fingerprint)
        for number, name in enumerate(("drawings", "others")):
            with ShardWriter(folder / name / str(level), header=header, samples_per_shard=5) as writer:
                for index in range(23):
                    base_grid = (4, 16) if index % 3 == 0 else (8, 8)
                    count = SCHEDULE.num_codes(level, base_grid[0] / base_grid[1])
                    drawn = np.random.default_rng([level, number, index])
                    codes = Codes(drawn.integers(0, NUM_CODES, count, dtype=np.int32), level, base_grid)
                    captions.append(f"number {index} of the {name}" + " and so on" * (index % 4))
                    record = {"segments": [{"text": captions[-1]}, {"image": "0.png"}], "source": name}
                    writer.write(f"{name}{index:02d}", record, {"0.npz": encode_codes(codes)})
    train_text_tokenizer(captions, folder / "text", 300)


def make_data(folder: Path, workers: int) -> MixtureDataModule:
    """Three sources, of which two read the same shards."""
    drawings, others = ({"train": f"{folder}/{name}/{{level}}/*.tar"} for name in ("drawings", "others"))
    return MixtureDataModule(
        sources={
            "drawings": Source(shards=drawings, weight=2, arrange=CaptionThenImage(caption_dropout=0.4)),
            "captions": Source(shards=drawings, weight=1, arrange=ImageThenCaption()),
            "others": Source(shards=others, weight=1, arrange=CaptionThenImage(caption_dropout=0.4)),
        },
        schedule=SCHEDULE,
        text_tokenizer=str(folder / "text"),
        codebook_size=NUM_CODES,
        level=32,
        packing="fixed_length",
        max_length=400,
        batch_size=2,
        validation_splits=[],
        num_workers=workers,
    )


class Record(L.Callback):
    """What each step logged, the rate that it was made with, and what it was shown."""

    def __init__(self) -> None:
        self.steps: dict[str, Tensor] = {}
        self.shown: dict[int, list[str]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note them."""
        logged = {"rate": trainer.optimizers[0].param_groups[0]["lr"], **trainer.callback_metrics}
        self.steps |= {
            f"{trainer.global_step} {name}": torch.as_tensor(value).detach().clone() for name, value in logged.items()
        }
        self.shown[trainer.global_step] = list(batch.keys)


def run(folder: Path, cell: Cell, cut: str | None) -> dict[str, Any]:
    """The end of a run, on this rank: straight with checkpoints on the way, or from the checkpoint of a cut on."""
    L.seed_everything(0, verbose=False)
    record = Record()
    callbacks: list[L.Callback] = []
    strategy: Any = {"single": "auto", "ddp": "ddp"}.get(cell.strategy)
    if strategy is None:
        strategy = ModelParallelStrategy(cell.ranks, 1, save_distributed_checkpoint=True)
        callbacks.append(FSDPSharding(wrap=WRAP))
    if cut is None:  # of the straight run; steps 4 and 6 are among those
        callbacks.append(ModelCheckpoint(folder / cell.name, "{step}", every_n_train_steps=2, save_top_k=-1))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=cell.ranks,
        strategy=strategy,
        max_epochs=len(STAGES),
        reload_dataloaders_every_n_epochs=1,
        gradient_clip_val=0.5,
        callbacks=[record, EMA(decay=0.8, warmup=1.0), ResolutionCurriculum(STAGES), *callbacks],
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=cut is None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PretrainingModule(
        transformer=DECODER,
        tokenizer=str(folder / "tokenizer.ckpt"),
        text_tokenizer=str(folder / "text"),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        warmup_steps=3,
    )
    checkpoint = None if cut is None else folder / cell.name / f"step={CUTS[cut]}.ckpt"
    trainer.fit(module, make_data(folder, cell.workers), ckpt_path=checkpoint)
    named = {id(parameter): name for name, parameter in module.named_parameters()}
    moments = {
        f"{named[id(parameter)]} {key}": value
        for parameter, state in trainer.optimizers[0].state.items()
        for key, value in state.items()
    }
    weights, average = (dict(part.state_dict()) for part in (module.transformer, module.ema))
    ended = {"weights": weights, "average": average, "optimiser": moments, "steps": record.steps}
    return {**{part: _local(tensors) for part, tensors in ended.items()}, "shown": record.shown}


def _local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    return {name: value.detach().clone() for name, value in own.items()}


def run_all(folder: Path, cells: list[Cell], phase: str) -> None:
    """All runs of a phase in this process, one after the other; the last ones' ends are left in files."""
    rank = os.environ.get("RANK", "0")
    for cell in cells:
        for cut in (None,) if phase == "straight" else CUTS:
            torch.save(run(folder, cell, cut), folder / f"{cell.name} {cut or 'straight'} {rank}.pt")


def in_new_processes(folder: Path, cells: list[Cell], phase: str) -> None:
    """All runs of a phase, in as many processes as they have ranks. Raises RuntimeError with what a failed one said."""
    for ranks in sorted({cell.ranks for cell in cells}):
        words = [f"{cell.ranks} {cell.strategy} {cell.workers}" for cell in cells if cell.ranks == ranks]
        command = [sys.executable, __file__, "--folder", str(folder), "--phase", phase, "--cells", *words]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        processes = []
        for rank in map(str, range(ranks)):
            place = {"WORLD_SIZE": str(ranks), "NODE_RANK": "0", "RANK": rank, "LOCAL_RANK": rank}
            with open(folder / f"{phase} {rank}.log", "w") as log:
                processes.append(
                    subprocess.Popen(command, env={**os.environ, **where, **place}, stdout=log, stderr=log)
                )
        try:
            # the first that fails ends the others, which would wait for it
            failed = any(process.wait(timeout=1800) for process in processes)
        finally:
            for process in processes:
                process.kill()
        if failed:
            logs = [(folder / f"{phase} {rank}.log").read_text() for rank in range(ranks)]
            raise RuntimeError("\n".join(logs))


def differences(folder: Path, cell: Cell, cut: str) -> dict[str, float]:
    """Largest difference by part, over all ranks. Raises RuntimeError where the two runs do not even have the same parts."""
    found = dict.fromkeys(PARTS, 0.0)
    for rank in range(cell.ranks):
        straight = torch.load(folder / f"{cell.name} straight {rank}.pt")
        resumed = torch.load(folder / f"{cell.name} {cut} {rank}.pt")
        after = range(CUTS[cut] + 1, sum(stage.num_batches for stage in STAGES) + 1)
        straight["steps"] = {name: value for name, value in straight["steps"].items() if int(name.split()[0]) in after}
        if list(resumed["shown"]) != list(after) or any(resumed["shown"][n] != straight["shown"][n] for n in after):
            raise RuntimeError(f"{cell} {cut}: rank {rank} was shown {resumed['shown']} and not {straight['shown']}")
        for part in PARTS:
            ours, theirs = straight[part], resumed[part]
            if not ours or set(ours) != set(theirs):
                raise RuntimeError(f"{cell} {cut}: {part} are {sorted(theirs)} and not {sorted(ours)}")
            for name, value in ours.items():
                if value.numel():
                    found[part] = max(found[part], float((value.double() - theirs[name].double()).abs().max()))
    return found


def compare(folder: Path, cells: list[Cell]) -> dict[tuple[Cell, str], dict[str, float]]:
    """Largest differences between the straight and the resumed runs of each cell and cut."""
    prepare(folder)
    in_new_processes(folder, cells, "straight")
    in_new_processes(folder, cells, "resumed")
    return {(cell, cut): differences(folder, cell, cut) for cell in cells for cut in CUTS}


def main() -> int:
    """Print the table; the exit code is 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", type=Cell.parse, default=ALL)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=("straight", "resumed"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase is not None:
        run_all(arguments.folder, arguments.cells, arguments.phase)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        results = compare(Path(folder), arguments.cells)
    print(f"{'processes':<11}{'strategy':<10}{'workers':<9}{'cut off':<10}" + "".join(f"{part:>11}" for part in PARTS))
    for (cell, cut), found in results.items():
        values = "".join(f"{found[part]:>11.2g}" for part in PARTS)
        print(f"{cell.ranks:<11}{cell.strategy:<10}{cell.workers:<9}{cut:<10}{values}")
    return int(any(value for found in results.values() for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
