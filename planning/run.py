"""Where a run takes place and in which numbers it computes, read off the `trainer` part of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

# Bytes of a weight and of what is computed with it. Under `mixed` autocast casts, and the residual stream stays float32.
PRECISIONS = {
    "64-true": (8, 8),
    "32-true": (4, 4),
    "16-mixed": (4, 2),
    "bf16-mixed": (4, 2),
    "16-true": (2, 2),
    "bf16-true": (2, 2),
}
ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """The facts of a trainer that memory and work depend on."""

    strategy: Literal["single", "ddp", "fsdp2"]
    devices: int
    """Of all nodes together."""
    shards: int
    """Devices that share one copy of the parameters."""
    precision: str
    weight_bytes: int
    """Of a weight, its gradient and what the optimiser keeps of it."""
    compute_bytes: int
    """Of a number that products take."""
    residual_bytes: int
    """Of a number of the residual stream."""
    gathered_bytes: int
    """Of a weight, and of its gradient, while FSDP2 has them whole on every device."""
    reduced_bytes: int
    """Of a gradient while FSDP2 sums it over devices."""
    resharded: bool
    """Whether FSDP2 frees gathered weights behind the forward pass."""
    accumulate: int
    """Batches of each device in one optimiser step."""
    ema: bool
    """Whether a second copy of the weights is kept."""
    activation_checkpointing: bool

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of weights, gradients and what the optimiser keeps of them."""
        return getattr(torch, {8: "float64", 4: "float32", 2: "bfloat16"}[self.weight_bytes])


def read_run(trainer: Any, activation_checkpointing: bool | None, notes: list[str]) -> Run:
    """Read a parsed `trainer` section.

    Args:
        trainer: the namespace of the section.
        activation_checkpointing: the user's word on it; None looks for the callback FSDPSharding.
        notes: what had to be assumed is added here.

    Raises:
        ValueError: a strategy or precision that the plan has no numbers for, or numbers that do not fit each other.
    """
    devices = _count(trainer.devices, notes) * int(trainer.num_nodes)
    strategy, shards = _strategy(trainer, devices)
    precision = str(trainer.precision or "32-true")
    precision = ALIASES.get(precision, precision)
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision {precision}: plan knows {', '.join(PRECISIONS)}")
    weight_bytes, compute_bytes = PRECISIONS[precision]
    sharding = callback_options(trainer, "FSDPSharding") if strategy == "fsdp2" else None
    if strategy == "fsdp2" and sharding is None:
        raise ValueError(
            "trainer.strategy is ModelParallelStrategy, but trainer.callbacks has no FSDPSharding, which does the sharding"
        )
    options = sharding or {}
    # The types of FSDPSharding count inside of what it wraps, the residual stream included.
    gathered_bytes = _bytes(options.get("param_dtype")) or weight_bytes
    if activation_checkpointing is None:
        activation_checkpointing = bool(options.get("activation_checkpointing"))
    return Run(
        strategy=strategy,
        devices=devices,
        shards=shards,
        precision=precision,
        weight_bytes=weight_bytes,
        compute_bytes=min(compute_bytes, gathered_bytes),
        residual_bytes=gathered_bytes,
        gathered_bytes=gathered_bytes,
        reduced_bytes=_bytes(options.get("reduce_dtype")) or gathered_bytes,
        resharded=options.get("reshard_after_forward", True),
        accumulate=int(trainer.accumulate_grad_batches),
        ema=callback_options(trainer, "EMA") is not None,
        activation_checkpointing=activation_checkpointing,
    )


def callback_options(trainer: Any, name: str) -> Any | None:
    """The arguments of the callback whose class is called `name`; None if there is none."""
    callbacks = trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback.class_path.rsplit(".", 1)[-1] == name:
            return callback.get("init_args") or {}
    return None


def _bytes(dtype: str | None) -> int | None:
    return None if dtype is None else getattr(torch, dtype).itemsize


def _count(devices: Any, notes: list[str]) -> int:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        notes.append(f"trainer.devices is {devices}, which depends on the machine: counted as 1 for each node")
        return 1
    text = str(devices)
    return len(text.strip(",").split(",")) if "," in text else int(text)


def _strategy(trainer: Any, devices: int) -> tuple[Literal["single", "ddp", "fsdp2"], int]:
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else strategy.class_path.rsplit(".", 1)[-1]
    if name == "auto" or name == "SingleDeviceStrategy":
        return ("ddp" if devices > 1 else "single"), 1
    if name.startswith("ddp") or name == "DDPStrategy":
        return "ddp", 1
    if name not in ("ModelParallelStrategy", "model_parallel"):
        raise ValueError(f"trainer.strategy {name}: plan knows auto, ddp and ModelParallelStrategy")
    given = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    nodes = int(trainer.num_nodes)
    data, tensor = given.get("data_parallel_size", "auto"), given.get("tensor_parallel_size", "auto")
    data, tensor = nodes if data == "auto" else int(data), devices // nodes if tensor == "auto" else int(tensor)
    if data * tensor != devices:
        raise ValueError(
            f"trainer.strategy: data_parallel_size {data} x tensor_parallel_size {tensor} are not the {devices} devices of "
            f"trainer.devices x trainer.num_nodes"
        )
    if tensor != 1:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size is {tensor}, but nothing here is split that way: set "
            f"data_parallel_size: {devices} and tensor_parallel_size: 1 (auto means 1 and the devices of a node)"
        )
    return "fsdp2", data
