"""Training with parameters that are whole on every rank beside sharded ones (FSDP2), or beside those that DDP looks after.

A codebook is written in place while it trains, and a discriminator takes part in some steps and some backward passes
only; neither fits what FSDP2 and DDP do with a parameter. Both stay whole: `keep_whole` averages their gradients over
ranks as soon as they are complete, whatever the strategy. Clipping and optimisers then meet both kinds together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nextflow.models.tokenizer.ranks import num_ranks, sum_over_ranks


def keep_whole(module: nn.Module, parts: Iterable[str]) -> None:
    """Averages the gradients of some submodules' parameters over ranks after every backward pass, and tells DDP not to.

    Nothing happens in a run of one process. `from_rank_0` makes the values equal that training starts from.

    Args:
        module: the module that DDP would wrap.
        parts: names of submodules.
    """
    if num_ranks() == 1:
        return
    names = [f"{part}.{name}" for part in parts for name, _ in module.get_submodule(part).named_parameters()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    for name in names:
        parameter = module.get_parameter(name)
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)


@torch.no_grad()
def from_rank_0(module: nn.Module) -> None:
    """Gives all ranks rank 0's values of the parameters that are whole."""
    for parameter in _by_kind(module.parameters()).whole if num_ranks() > 1 else []:
        dist.broadcast(parameter, src=0)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients so that their norm, over sharded and whole ones together, is at most `max_norm`; equal on all ranks.

    Returns the norm before. `torch.nn.utils.clip_grad_norm_` takes either kind, but not both at once.
    """
    kinds = _with_gradient(parameters)
    norm = _norm(kinds)
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, max_norm, norm)
    return norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients, sharded and whole ones together; equal on all ranks, which must all ask for it."""
    return _norm(_with_gradient(parameters))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """All parameters of a module sharded by FSDP2 stay gathered inside, so that ranks may run different numbers of forwards.

    Without it every forward gathers anew, all ranks together: decoding, which ends when a rank's own answers do, would hang.
    Nothing happens to a module that is not sharded.
    """
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units:
            # As FSDPSharding shards: the outermost unit is needed again at once and stays gathered after its forward.
            unit.set_reshard_after_forward(unit is not module, recurse=False)
            unit.reshard()


def optimizer_groups(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """What to hand to an optimiser: the parameters, or a group of each kind, as fused updates take one kind at a time."""
    parameters = list(parameters)
    kinds = _by_kind(parameters)
    return [{"params": kind} for kind in kinds] if all(kinds) else parameters


class _Kinds(NamedTuple):
    sharded: list[nn.Parameter]
    whole: list[nn.Parameter]


def _by_kind(parameters: Iterable[nn.Parameter]) -> _Kinds:
    kinds = _Kinds([], [])
    for parameter in parameters:
        (kinds.sharded if isinstance(parameter, DTensor) else kinds.whole).append(parameter)
    return kinds


def _with_gradient(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    return [kind for kind in _by_kind(parameter for parameter in parameters if parameter.grad is not None) if kind]


def _norm(kinds: list[list[nn.Parameter]]) -> Tensor:
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())


def _average_gradient(parameter: Tensor) -> None:
    # also right under gradient accumulation: what was there before is already equal on all ranks, and stays
    if parameter.grad is not None:
        sum_over_ranks(parameter.grad).div_(num_ranks())
