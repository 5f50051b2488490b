"""What our modules add to Lightning's checkpoints so that any strategy, with or without an average, can read them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy


def number_optimizer_states(module: Any, checkpoint: dict[str, Any]) -> None:
    """Numbers the parameters in optimiser states as `module.parameters()` does.

    torch numbers them group by group. A run under FSDP2 that resumes from one file takes the numbers for those of the module
    and would give moments to other parameters; one on a single device, or under DDP, goes by the order in the groups.
    """
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        return  # knows them by name
    number = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    for optimizer, state in zip(module.trainer.optimizers, checkpoint.get("optimizer_states", [])):
        grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers = [number[id(parameter)] for parameter in grouped]
        state["state"] = {numbers[index]: value for index, value in state["state"].items()}
        state["param_groups"] = [
            {**group, "params": [numbers[index] for index in group["params"]]} for group in state["param_groups"]
        ]


def check_average(module: Any, checkpoint: dict[str, Any], stored: bool) -> None:
    """Compares a checkpoint with the run that reads it; outside of `fit` an average that nobody asks for is passed over.

    Args:
        module: with the attribute `ema`.
        checkpoint: as Lightning loads it.
        stored: whether it holds an average.

    Raises:
        ValueError: one of the two has an average and the other not.
    """
    if module.ema is not None and not stored:
        raise ValueError("the checkpoint holds no average of the weights: leave the callback EMA out")
    if module.ema is None and stored:
        if module._trainer is not None and module.trainer.state.fn == "fit":
            raise ValueError(
                "the checkpoint holds an average of the weights, which would be lost: add the callback EMA, or begin a run "
                "with model.initialize_from"
            )
        state = checkpoint.get("state_dict", {})
        for name in [name for name in state if name.startswith("ema.")]:
            del state[name]
