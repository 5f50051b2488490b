"""Building a transformer where it will train: whole, or in shards of which no process ever holds the whole (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.model import Transformer


def build_transformer(
    config: TransformerConfig, seed: int, prepare: Callable[[Transformer], None], shard: Any, strategy: Strategy | None
) -> Transformer:
    """A transformer with initial weights, equal on any number of processes.

    Args:
        config: its shape.
        seed: of the weights; rank 0's counts.
        prepare: called before it is sharded; freezes what does not train.
        shard: what a sharding callback handed over, or None.
        strategy: of the trainer; needed with `shard`.
    """
    if shard is None or strategy is None:
        model = Transformer(config, seed)  # DDP gives all ranks rank 0's
        prepare(model)
        return model
    model = _sharded(config, prepare, shard, strategy.root_device)
    model.init_weights(strategy.broadcast(seed))
    return model


@torch.no_grad()
def build_average(model: Transformer, prepare: Callable[[Transformer], None], shard: Any) -> Transformer:
    """A copy in float32 that does not train, prepared and sharded as the model is."""

    def prepare_average(average: Transformer) -> None:
        prepare(average)
        average.float().requires_grad_(False)

    average = _sharded(model.config, prepare_average, shard, model.num_scales_table.device)
    average.init_table()
    for mean, parameter in zip(average.parameters(), model.parameters()):
        mean.copy_(parameter)
    return average


def _sharded(
    config: TransformerConfig, prepare: Callable[[Transformer], None], shard: Any, device: torch.device
) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    prepare(model)
    if shard is not None:
        # not the inputs: rotary positions are among what decoding calls it with
        shard(model, cast_inputs=False)
    return model.to_empty(device=device)
