"""The plan of a TokenizerModule: parameters of each part, bytes, and the images of each level.

Built on the meta device. Sizes of the semantic tower come from the folder `model.semantic_encoder`, or, where the user says so,
from `model.tokenizer.semantic`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextflow.models.tokenizer.config import TokenizerConfig
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.semantic import SemanticTower, read_semantic_config
from nextflow.planning.memory import optimizer_bytes, training_memory
from nextflow.planning.plan import Image, Part, Plan, PlanOptions, ratios_of, scales_of
from nextflow.planning.run import read_run
from nextflow.sequence.scales import ScaleSchedule, num_codes_of

# VGG16's convolutions and the linear heads of LPIPS, frozen.
PERCEPTUAL_PARAMETERS = 14_714_688 + 1_472


def plan_tokenizer(
    config: Any,
    options: PlanOptions,
    optimizer: Callable[..., torch.optim.Optimizer],
    discriminator_optimizer: Callable[..., torch.optim.Optimizer],
) -> Plan:
    """The plan of a parsed config whose model is a TokenizerModule.

    Args:
        config: the namespace with `trainer`, `model` and `data`.
        options: the user's `--plan.*`.
        optimizer: of the tokenizer.
        discriminator_optimizer: of the discriminator, where there is one.
    """
    notes: list[str] = []
    run = read_run(config.trainer, options.activation_checkpointing, notes)
    settings, data = config.model.init_args, config.data.get("init_args") or {}
    shape = _config(settings, options)
    with torch.device("meta"):
        tokenizer = Tokenizer(shape).to(run.weight_dtype)
        modules: dict[str, nn.Module] = {f"tokenizer.{name}": part for name, part in tokenizer.named_children()}
        if settings.stage == "joint" and settings.losses.semantic and shape.semantic is not None:
            modules["teacher"] = SemanticTower(shape.semantic, shape.schedule.stride).requires_grad_(False)
        if settings.losses.adversarial:
            modules["discriminator"] = PatchDiscriminator(DiscriminatorConfig(**settings.discriminator.as_dict()))
    if settings.stage == "decoder":
        tokenizer.requires_grad_(False)
        tokenizer.pixel_decoder.requires_grad_(True)
    elif shape.semantic is not None and not settings.losses.semantic:
        tokenizer.semantic_decoder.requires_grad_(False)
    parts = [_part(name, module) for name, module in modules.items()]
    if settings.losses.perceptual:
        parts.append(Part(name="perceptual", total=PERCEPTUAL_PARAMETERS, trained=0))
    state = optimizer_bytes(optimizer, [{"params": [p for p in tokenizer.parameters() if p.requires_grad]}], notes)
    if "discriminator" in modules:
        discriminated = [{"params": list(modules["discriminator"].parameters())}]
        state += optimizer_bytes(discriminator_optimizer, discriminated, notes)
    batch_size = data.get("batch_size") or 1
    largest = max(shape.schedule.levels)
    memory = training_memory(
        run,
        list(modules.values()),
        optimizer=state,
        activations=batch_size * _pixel_activations(tokenizer, shape.schedule.pixels(largest)),
        products=sum(p.numel() for p in tokenizer.parameters() if p.requires_grad and p.ndim > 1),
    )
    notes.append(
        f"activations are those of the pixel branch for {batch_size} images of level {largest}, as under "
        f"{'float32' if run.weight_bytes == 4 else run.precision}; those of the semantic branch come on top"
    )
    if settings.losses.perceptual:
        memory["weights"] += PERCEPTUAL_PARAMETERS * 4
    return Plan(
        model=f"tokenizer, stage {settings.stage}",
        run=run,
        parameters=parts,
        memory=memory,
        steps=[],
        images=[_image(level, shape.schedule) for level in shape.schedule.levels],
        scales=scales_of(shape.schedule),
        ratios=ratios_of(shape.schedule),
        notes=notes,
    )


def _config(settings: Any, options: PlanOptions) -> TokenizerConfig:
    config = TokenizerConfig.from_dict(settings.tokenizer.as_dict())
    if settings.stage == "pixel":
        return replace(config, semantic=None)
    folder = settings.semantic_encoder
    if config.semantic is None or folder is None:
        return config
    if (Path(folder) / "config.json").is_file():
        return replace(config, semantic=read_semantic_config(folder, config.semantic, config.schedule.stride))
    if not options.semantic_from_config:
        raise ValueError(
            f"model.semantic_encoder: there is no config.json in {folder}, which has the sizes of the tower; with "
            f"--plan.semantic_from_config true it has those of model.tokenizer.semantic (width {config.semantic.width}, "
            f"{config.semantic.num_layers} layers)"
        )
    return config


def _part(name: str, module: nn.Module) -> Part:
    parameters = list(module.parameters())
    return Part(
        name=name,
        total=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    )


def _pixel_activations(tokenizer: Tokenizer, pixels: tuple[int, int]) -> float:
    """Bytes that the pixel encoder and decoder keep of one image, found by running them on meta."""
    weights = {id(parameter) for parameter in tokenizer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    dtype = next(tokenizer.pixel_encoder.parameters()).dtype
    images_BCHW = torch.empty(1, 3, *pixels, device="meta", dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokenizer.pixel_decoder(tokenizer.pixel_encoder(images_BCHW))
    return float(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


def _image(level: int, schedule: ScaleSchedule) -> Image:
    grids = schedule.grids(level)
    return Image(level=level, pixels=schedule.pixels(level), codes=num_codes_of(grids), steps=len(grids))
