"""Sharding over processes with PyTorch's FSDP2, as a callback that holds the plan.

The strategy is chosen by the trainer; the module applies the plan once its layers exist (`configure_model`); without
this callback the same module runs on one device or under DDP.

    trainer:
      strategy:
        class_path: lightning.pytorch.strategies.ModelParallelStrategy
        init_args: {data_parallel_size: 8, tensor_parallel_size: 1, save_distributed_checkpoint: false}
      callbacks:
        - class_path: nextflow.callbacks.fsdp_sharding.FSDPSharding
          init_args:
            wrap: [nextflow.models.transformer.block.Block, nextflow.models.transformer.head.SingleHead]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

Precision = Literal["float32", "bfloat16", "float16"]
FORWARD_METHODS = ["encode", "decode", "embed", "step", "cross_entropy"]
"""What our models offer beside `forward`: tokenizer, transformer, output head."""


class FSDPSharding(L.Callback):
    """Sets `pl_module.shard`, with which the module's `configure_model` shards what it trains.

    Needs `ModelParallelStrategy` and a module with the attribute `shard`. Ranks must run the same forward passes, so
    every rank needs the same number of batches.

    Args:
        wrap: import paths of classes whose instances become one unit each, gathered and freed together; units may hold
            others, and what is left over is one more.
        forward_methods: methods beside `forward` that are called from outside, and not by each other: of units, or of the
            whole module where no unit has them. Names that occur nowhere are passed over.
        param_dtype: data type of gathered parameters, to which a unit casts what it is called with; null keeps that of
            the weights. Parts that others call with float32 (decoders behind a quantiser) have to be units then.
        reduce_dtype: data type in which gradients are summed over ranks; null takes `param_dtype`.
        reshard_after_forward: whether to free gathered parameters after the forward pass and gather them again in the
            backward pass.
        activation_checkpointing: whether units of `wrap` that hold no others keep their inputs alone and compute again
            in the backward pass; units with a forward method (output heads) save memory by themselves.
        compile: whether to compile the forward pass of each of them.
    """

    def __init__(
        self,
        wrap: list[str],
        forward_methods: list[str] = FORWARD_METHODS,
        param_dtype: Precision | None = None,
        reduce_dtype: Precision | None = None,
        reshard_after_forward: bool = True,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        self.classes = tuple(_class(path) for path in wrap)
        self.forward_methods = forward_methods
        self.precision = MixedPrecisionPolicy(
            param_dtype=None if param_dtype is None else getattr(torch, param_dtype),
            reduce_dtype=None if reduce_dtype is None else getattr(torch, reduce_dtype),
        )
        self.reshard_after_forward = reshard_after_forward
        self.activation_checkpointing, self.compile = activation_checkpointing, compile

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Hand the plan over. Raises ValueError saying what to change."""
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "FSDPSharding needs trainer.strategy: lightning.pytorch.strategies.ModelParallelStrategy, "
                f"not {type(trainer.strategy).__name__}"
            )
        mesh = trainer.strategy.device_mesh
        if mesh["data_parallel"].size() != trainer.world_size:
            raise ValueError(
                f"trainer.strategy: set data_parallel_size to {trainer.world_size} and tensor_parallel_size to 1; "
                f"they are {mesh['data_parallel'].size()} and {mesh['tensor_parallel'].size()}"
            )
        if not hasattr(pl_module, "shard"):
            raise ValueError(f"FSDPSharding: {type(pl_module).__name__} has no attribute `shard` and cannot be sharded")
        pl_module.shard = partial(self.shard, mesh["data_parallel"])

    def shard(self, mesh: Any, module: nn.Module, whole: Iterable[nn.Parameter] = (), cast_inputs: bool = True) -> None:
        """Shard a module in place.

        Args:
            mesh: the processes to shard over.
            module: with its initial weights, or on the meta device.
            whole: parameters that every rank keeps whole; their gradients are the caller's to average.
            cast_inputs: whether to cast what the module itself is called with to `param_dtype`, as units always do; not
                where rotary positions are among it, which 16 bits do not hold.

        Raises ValueError when no submodule is an instance of a class of `wrap`.
        """
        units = [child for child in module.modules() if isinstance(child, self.classes) and child is not module]
        if self.classes and not units:
            names = ", ".join(cls.__name__ for cls in self.classes)
            raise ValueError(f"FSDPSharding.wrap: {type(module).__name__} holds no {names}")
        options = {"mesh": mesh, "ignored_params": set(whole)}
        of_units: set[str] = set()
        for unit in reversed(units):  # a module comes after those inside it
            methods = [name for name in self.forward_methods if _is_method(unit, name)]
            innermost = not any(isinstance(child, self.classes) for child in unit.modules() if child is not unit)
            if innermost and not methods:
                self._rewrite_forward(unit)
            # A head comes last: the backward pass would gather it again at once.
            reshard = self.reshard_after_forward and not methods
            fully_shard(unit, reshard_after_forward=reshard, mp_policy=self.precision, **options)
            for name in methods:
                register_fsdp_forward_method(unit, name)
            of_units.update(methods)
        precision = self.precision if cast_inputs else replace(self.precision, cast_forward_inputs=False)
        fully_shard(module, mp_policy=precision, **options)  # gathered again at once, too: it stays as it is
        for name in self.forward_methods:
            if _is_method(module, name) and name not in of_units:
                register_fsdp_forward_method(module, name)

    def _rewrite_forward(self, unit: nn.Module) -> None:
        # inside of FSDP2's hooks: recomputed and compiled code finds gathered parameters
        forward: Any = unit.forward
        if self.activation_checkpointing:
            forward = partial(checkpoint, forward, use_reentrant=False)
        if self.compile:
            forward = torch.compile(forward)
        unit.forward = forward


def _is_method(module: nn.Module, name: str) -> bool:
    # and not a submodule: the tokenizer's ViT has one that is called as a method of the transformer is
    return hasattr(module, name) and not isinstance(getattr(module, name), nn.Module)


def _class(path: str) -> type[nn.Module]:
    name = path.rpartition(".")[2]
    try:
        found = getattr(import_module(path.rpartition(".")[0]), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"FSDPSharding.wrap: there is no class {path!r}; give its full import path") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"FSDPSharding.wrap: {path} is not an nn.Module class")
    return found
