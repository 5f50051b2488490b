"""Byte formulas against what torch really keeps: optimiser state after a step, activations of a block, keys and values."""

import pytest
import torch
from torch import nn

from nextflow.generation.cache import KVCache
from nextflow.kernels.attention import Visibility
from nextflow.kernels.rope import rope_cos_sin
from nextflow.lightning_modules.optim import parameter_groups
from nextflow.models.transformer.block import Block
from nextflow.models.transformer.config import DecoderConfig
from nextflow.planning.memory import activation_bytes, cache_bytes, optimizer_bytes, training_memory
from nextflow.planning.run import Run
from nextflow.sequence.flops import DecoderShape, Work

CONFIG = DecoderConfig(
    width=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=16, mlp_width=160, rope_sections=(4, 2, 2)
)


def small_model():
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 5, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True),
        lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True),
        lambda groups: torch.optim.SGD(groups, lr=1e-3),
        lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
        lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.9, centered=True),
    ],
)
def test_optimizer_state_is_that_of_a_real_step(make, dtype):
    real = small_model().to(dtype)
    for parameter in real.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(parameter_groups(real))
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    expected = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with torch.device("meta"):
        planned = small_model().to(dtype)
    notes: list[str] = []
    assert optimizer_bytes(make, parameter_groups(planned), notes) == expected
    assert not notes


def test_an_optimizer_that_needs_real_numbers_is_noted():
    with torch.device("meta"):
        planned = small_model()
    notes: list[str] = []
    assert optimizer_bytes(lambda groups: torch.optim.Adafactor(groups, lr=1e-3), parameter_groups(planned), notes) == 0
    assert "state of Adafactor is missing" in notes[0]


@pytest.mark.parametrize("mixed", [False, True])
def test_activations_of_a_block_are_what_autograd_keeps(mixed):
    """Within a fifth: on a CPU a norm keeps its normalised input as well, which fused kernels do not. Masks are left out."""
    torch.manual_seed(0)
    block, length = Block(CONFIG, 0), 300
    block.attention.implementation = "sdpa"
    visibility = Visibility(torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None])
    weights = {tuple(parameter.shape) for parameter in block.parameters()}
    weights |= {shape[::-1] for shape in weights}  # and autocast's copies of them
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tuple(tensor.shape) not in weights and tuple(tensor.shape[-2:]) != (length, length):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x_BLW = torch.randn(1, length, CONFIG.width, requires_grad=True)
    dtype = torch.bfloat16 if mixed else torch.float32
    rotation = rope_cos_sin(torch.arange(length).float().expand(3, 1, -1), 16, 1e4, CONFIG.rope_sections).to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=mixed):
        block(x_BLW, rotation, visibility)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    options = {"code_dim": 8, "residual_bytes": 4, "compute_bytes": 2 if mixed else 4}
    outside = activation_bytes(DecoderShape.of(CONFIG), Work(positions=length), **options)
    final_norm = length * (CONFIG.width * 4 + 4)
    assert outside - final_norm == pytest.approx(measured, rel=0.2)
    assert outside - final_norm <= measured


def test_checkpointing_keeps_one_block_and_the_input_of_each():
    shape = DecoderShape()
    options = {"code_dim": 40, "residual_bytes": 2, "compute_bytes": 2}
    work = Work(positions=16384, targets=16384)
    full = activation_bytes(shape, work, **options)
    saved = activation_bytes(shape, work, checkpointing=True, **options)
    assert saved < full / 12


def test_cache_is_that_of_the_engine():
    shape = DecoderShape.of(CONFIG)
    cache = KVCache(batch=1, layers=1, capacity=29)
    for count in (20, 1):  # the prompt, and a step that reads it again
        cache.begin(torch.zeros(1, count, dtype=torch.int64), [count])
        keys, values, _ = cache.append(0, torch.zeros(1, 4, count, 16), torch.zeros(1, 4, count, 16))
    # The buffer holds the capacity and one slot for padding.
    real = keys.untyped_storage().nbytes() + values.untyped_storage().nbytes()
    assert real == cache_bytes(shape, 30, compute_bytes=4)


def test_memory_is_split_where_the_strategy_splits_it():
    with torch.device("meta"):
        model = nn.Linear(1000, 100, bias=False)
    run = {
        "devices": 4, "precision": "bf16-mixed", "weight_bytes": 4, "compute_bytes": 2, "residual_bytes": 4,
        "gathered_bytes": 4, "reduced_bytes": 4, "resharded": True, "accumulate": 1, "ema": True,
        "activation_checkpointing": False,
    }  # fmt: skip
    options = {"optimizer": 800_000, "activations": 5.0, "whole_weights": 50, "whole_gradients": 40, "products": 7}
    sharded = training_memory(Run(strategy="fsdp2", shards=4, **run), [model], **options)
    assert sharded == {
        "weights": 100_000, "gradients": 100_000, "optimizer": 200_000, "ema": 100_000, "gathered_weights": 200,
        "gathered_gradients": 160, "autocast_copies": 14, "activations": 5.0,
    }  # fmt: skip
    # FSDPSharding's own types: products in bfloat16 without autocast, gradients summed in float32 from a copy.
    own = {**run, "precision": "32-true", "residual_bytes": 2, "gathered_bytes": 2}
    cast = training_memory(Run(strategy="fsdp2", shards=4, **own), [model], **options)
    assert (cast["weights"], cast["gathered_weights"], cast["gathered_gradients"]) == (100_000, 100, 240)
    assert "autocast_copies" not in cast
    copies = training_memory(Run(strategy="ddp", shards=1, **run), [model], **options)
    assert copies["weights"] == copies["gradients"] == copies["gradient_buckets"] == copies["ema"] == 400_000
