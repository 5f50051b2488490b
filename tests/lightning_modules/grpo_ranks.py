"""One rank of the two-process test in `test_grpo_ranks.py`: `python grpo_ranks.py FOLDER`, with its rank in the environment."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from nextflow.callbacks.fsdp_sharding import FSDPSharding
from nextflow.datamodules.prompts import PromptItem
from nextflow.lightning_modules.grpo_objective import ObjectiveConfig
from nextflow.lightning_modules.grpo_rollouts import RolloutConfig
from nextflow.tests.lightning_modules import tiny_grpo as tiny

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
WRAP = ["nextflow.models.transformer.block.Block", "nextflow.models.transformer.head.SingleHead"]
MIDDLE_RETURN = RolloutConfig(num_generations=3, prefix_scales=1, middle_return=True, prefix_updates=1)


def main(folder):
    """Three rounds at one go; and four of middle return, prefixes and suffixes in turn, interrupted behind the third."""
    whole = run(folder, steps=6)
    run(folder, steps=6, rollouts=MIDDLE_RETURN, total_steps=8, save=f"{folder}/{RANKS}.ckpt")
    resumed = run(folder, steps=8, rollouts=MIDDLE_RETURN, total_steps=8, resume=f"{folder}/{RANKS}.ckpt")
    return {"whole": whole, "resumed": resumed}


def run(folder, *, steps, resume=None, save=None, **changes):
    """Two inner steps a round; a prompt for each rank where there are two. Their pictures differ in the number of scales."""
    options = {"objective": ObjectiveConfig(beta=0.1, scale_rewards="batch", loss_type="dapo"), **changes}
    module = tiny.make(
        Path(folder), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.3), num_iterations=2, **options
    )
    items = [PromptItem(prompt="a red dog", level=16), PromptItem(prompt="two blue cats")]
    data = tiny.prompts(Path(folder), prompts=items, batch_size=2 // RANKS)
    ranks = {}
    if RANKS == 2:
        ranks = {
            "strategy": ModelParallelStrategy(RANKS, 1),
            "callbacks": [FSDPSharding(wrap=WRAP)],
            "devices": RANKS,
        }
    trainer = tiny.trainer(Path(folder), max_steps=steps, **ranks)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    sharded = all(isinstance(parameter, DTensor) for parameter in module.transformer.parameters())
    state = module.transformer.state_dict()
    weights = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    names = ("grpo/reward", "grpo/kl", "grpo/grad_norm", "grpo/sampling/sampling_logp_difference/mean")
    logs = {name: float(trainer.callback_metrics[name]) for name in names}
    return {"weights": weights, "logs": logs, "sharded": sharded}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(main(sys.argv[1]), f"{sys.argv[1]}/{RANK}.pt")
