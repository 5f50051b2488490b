"""One rank of the two-process test in `test_grpo_ranks.py`: `python grpo_ranks.py FOLDER`, with its rank in the environment."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from nextflow.callbacks.fsdp_sharding import FSDPSharding
from nextflow.datamodules.prompts import PromptItem
from nextflow.lightning_modules.grpo_objective import ObjectiveConfig

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
WRAP = ["nextflow.models.transformer.block.Block", "nextflow.models.transformer.head.SingleHead"]


def one_process_tests():
    """The module test_grpo.py, whose tiny models these are."""
    spec = importlib.util.spec_from_file_location("test_grpo", Path(__file__).with_name("test_grpo.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(folder):
    """Three rounds of two prompts, one for each rank where there are two; their pictures have different numbers of scales."""
    tests = one_process_tests()
    module = tests.make(
        Path(folder),
        objective=ObjectiveConfig(beta=0.1, scale_rewards="batch", loss_type="dapo"),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.3),
        num_iterations=2,
    )
    items = [PromptItem(prompt="a red dog", level=16), PromptItem(prompt="two blue cats")]
    data = tests.prompts(Path(folder), prompts=items, batch_size=2 // RANKS)
    options = {}
    if RANKS == 2:
        options = {
            "strategy": ModelParallelStrategy(RANKS, 1),
            "callbacks": [FSDPSharding(wrap=WRAP)],
            "devices": RANKS,
        }
    trainer = tests.trainer(Path(folder), max_steps=6, **options)
    trainer.fit(module, datamodule=data)
    sharded = all(isinstance(parameter, DTensor) for parameter in module.transformer.parameters())
    state = module.transformer.state_dict()
    weights = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    names = ("grpo/reward", "grpo/kl", "grpo/grad_norm", "grpo/sampling/sampling_logp_difference/mean")
    logs = {name: float(trainer.callback_metrics[name]) for name in names}
    return {"weights": weights, "logs": logs, "sharded": sharded}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(run(sys.argv[1]), f"{sys.argv[1]}/{RANK}.pt")
