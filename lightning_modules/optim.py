"""Learning-rate schedule, parameter groups, and which parameters train at all; shared by the training modules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nextflow.models.transformer.model import Transformer


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, final: float = 0.0) -> float:
    """Factor of the learning rate at an optimiser step: linear from 1/warmup_steps to 1, then half a cosine down to `final`.

    Args:
        step: from 0.
        warmup_steps: steps of the linear part; 0 starts at 1.
        total_steps: where the cosine ends; later steps stay at `final`.
        final: last factor; 1 keeps the rate constant after the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Parameters that train, in two groups: matrices with the optimiser's weight decay, all others and embeddings without."""
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    plain = [parameter for parameter in trained if parameter.ndim < 2 or id(parameter) in embeddings]
    chosen = {id(parameter) for parameter in plain}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if id(parameter) not in chosen]},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def freeze_for_alignment(transformer: Transformer) -> None:
    """Leave only what Qwen2.5-VL does not have to train: connector, embeddings of new ids and scales, head (paper 3.2.1)."""
    model = transformer
    model.requires_grad_(False)
    for part in (model.connector, model.code_embedding, model.boundary_embedding, model.scale_embedding, model.head):
        part.requires_grad_(True)


def default_adam(params: Iterable[Any]) -> torch.optim.Optimizer:
    """TokenFlow's optimiser of tokenizer and discriminator: Adam, learning rate 1e-4, betas (0.9, 0.95)."""
    return torch.optim.Adam(params, lr=1e-4, betas=(0.9, 0.95))


def default_adamw(params: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW for small models from scratch: learning rate 1e-3, weight decay 0.05."""
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05)
