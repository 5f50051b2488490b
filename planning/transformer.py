"""The plan of a PretrainingModule: parameters, bytes, FLOPs of its steps and of the images it generates.

The transformer is built on the meta device, with sizes from the config; neither data nor weights need to be there. What only
the tokenizers' files know (numbers of text ids, channels of a code) comes from them where they are there, else from `--plan.*`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nextflow.lightning_modules.optim import freeze_for_alignment, parameter_groups
from nextflow.models.transformer.config import DecoderConfig, TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.planning.memory import activation_bytes, cache_bytes, optimizer_bytes, training_memory
from nextflow.planning.plan import Image, Part, Plan, PlanOptions, Step, ratios_of, scales_of
from nextflow.planning.run import Run, callback_options, read_run
from nextflow.sequence.documents import Document, ImageSegment, Segment, TextSegment
from nextflow.sequence.flops import DecoderShape, FlopsModel, Work, document_work, generation_work
from nextflow.sequence.scales import ScaleSchedule, num_codes_of
from nextflow.sequence.text_tokenizer import load_text_tokenizer


def plan_transformer(config: Any, options: PlanOptions, optimizer: Callable[..., torch.optim.Optimizer]) -> Plan:
    """The plan of a parsed config whose model is a PretrainingModule.

    Args:
        config: the namespace with `trainer`, `model` and `data`.
        options: the user's `--plan.*`.
        optimizer: the model's optimiser.

    Raises ValueError naming the key that is missing or does not fit.
    """
    notes: list[str] = []
    run = read_run(config.trainer, options.activation_checkpointing, notes)
    settings, data = config.model.init_args, config.data.get("init_args") or {}
    sizes = _Sizes(settings, data, options, notes)
    with torch.device("meta"):
        model = Transformer(sizes.config).to(run.weight_dtype)
    if settings.trainable == "alignment":
        freeze_for_alignment(model)
    blocks_train = settings.trainable == "all"
    steps = _steps(config.trainer, data, options, sizes, run, blocks_train, notes) if data.get("packing") else []
    if not steps:
        notes.append("the data is not packed documents: no training is planned")
    elif not blocks_train:
        notes.append("activations are those of training every weight, more than trainable: alignment keeps")
    blocks, connector = _count(model.blocks), _count(model.connector)
    block, outside = blocks // sizes.shape.num_layers, _count(model) - blocks
    memory = training_memory(
        run,
        [model],
        optimizer=optimizer_bytes(optimizer, parameter_groups(model), notes),
        activations=max((step.activations for step in steps), default=0.0),
        # While one block computes the next is gathered; what is in no block stays from forward to backward.
        whole_weights=outside + (2 * block if run.resharded else blocks),
        whole_gradients=_count(model, trained=True)
        - _count(model.blocks, trained=True)
        + (block if blocks_train else 0),
        # The head's weights are cast piece by piece, and copies of a block that is computed again do not last.
        products=connector + (block if run.activation_checkpointing else blocks),
    )
    return Plan(
        model="transformer",
        run=run,
        parameters=_parts(model),
        memory=memory if steps else {"weights": memory["weights"]},
        steps=steps,
        images=[_image(level, options, sizes, run) for level in sizes.schedule.levels],
        scales=scales_of(sizes.schedule),
        ratios=ratios_of(sizes.schedule),
        notes=notes,
    )


class _Sizes:
    """Everything about shapes: the resolved configuration, the schedule, and the FLOPs that follow."""

    def __init__(self, settings: Any, data: Any, options: PlanOptions, notes: list[str]) -> None:
        stored = _stored_tokenizer(settings.tokenizer)
        codebook_size, code_dim = options.codebook_size, options.code_dim
        if codebook_size is None:
            codebook_size = data.get("codebook_size") or (stored and stored.codebook_size)
        if code_dim is None:
            code_dim = 40 if stored is None else sum(stored.code_dims)
            if stored is None:
                notes.append(
                    f"model.tokenizer: there is no {settings.tokenizer}; its code vectors count as 40 channels"
                )
        schedule = data.get("schedule") or (stored and stored.schedule)
        if codebook_size is None or schedule is None:
            raise ValueError(
                f"model.tokenizer: there is no {settings.tokenizer}, and the data names no codebook_size and schedule: "
                "give --plan.codebook_size, and --data.schedule where the data takes one"
            )
        self.schedule = schedule if isinstance(schedule, ScaleSchedule) else ScaleSchedule(**schedule.as_dict())
        self.config = TransformerConfig.resolve(
            DecoderConfig(**settings.transformer.as_dict()),
            text_size=_text_size(settings.text_tokenizer, options),
            codebook_size=codebook_size,
            code_dim=code_dim,
            start_id=0,  # ids change no shape
            end_id=0,
        )
        self.shape = DecoderShape.of(self.config)
        self.flops = FlopsModel(
            shape=self.shape, vocabulary_size=self.config.vocabulary.size, code_dim=self.config.code_dim
        )


def _text_size(folder: str, options: PlanOptions) -> int:
    if options.text_size is not None:
        return options.text_size
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(
            f"model.text_tokenizer: there is no tokenizer.json in {folder}; give the number of its ids as --plan.text_size "
            "(Qwen2.5-VL has 151665; its matrices have 152064 rows, the last of which belong to no id)"
        )
    return load_text_tokenizer(folder).size


def _stored_tokenizer(path: str) -> Any:
    """The configuration in an image tokenizer's checkpoint, None if there is none."""
    if not Path(path).is_file():
        return None
    from nextflow.lightning_modules.tokenizer import load_tokenizer

    return load_tokenizer(path).config


def _parts(model: Transformer) -> list[Part]:
    return [
        Part(name=name, total=_count(module), trained=_count(module, trained=True))
        for name, module in model.named_children()
    ]


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


def _steps(
    trainer: Any, data: Any, options: PlanOptions, sizes: _Sizes, run: Run, blocks_train: bool, notes: list[str]
) -> list[Step]:
    """One for each stage of the curriculum, or for the data's level."""
    curriculum = callback_options(trainer, "ResolutionCurriculum")
    stages = [] if curriculum is None else curriculum["stages"]
    plain = {"level": data.level, "num_batches": data.get("batches_per_epoch")}
    notes.append(
        f"a step holds documents of {options.text} text ids"
        + (
            f" and {options.images} square image(s); change that with --plan.text and --plan.images"
            if options.images
            else ""
        )
    )
    return [_step(stage, data, options, sizes, run, blocks_train) for stage in (stages or [plain])]


def _step(stage: Any, data: Any, options: PlanOptions, sizes: _Sizes, run: Run, blocks_train: bool) -> Step:
    feed_last_scale = bool(data.layout.feed_last_scale)
    image = ImageSegment(grids=sizes.schedule.grids(stage["level"]))
    text = [TextSegment(ids=range(options.text))] if options.text else []
    segments: tuple[Segment, ...] = (*text, *[image] * options.images)
    work = document_work(Document(segments=segments), feed_last_scale=feed_last_scale)
    batch_size = stage.get("batch_size") or data.batch_size
    if data.packing == "fixed_budget":
        documents = (stage.get("budget") or data.budget) / sizes.flops.in_positions(work)
    elif data.packing == "fixed_length":
        documents = batch_size * data.max_length / work.positions
    else:
        documents = float(batch_size)
    flops = sizes.flops.training(work, checkpointing=run.activation_checkpointing, blocks_train=blocks_train).total
    activations = activation_bytes(
        sizes.shape,
        work,
        code_dim=sizes.config.code_dim,
        residual_bytes=run.residual_bytes,
        compute_bytes=run.compute_bytes,
        checkpointing=run.activation_checkpointing,
    )
    return Step(
        level=stage["level"],
        num_batches=stage.get("num_batches"),
        documents=documents,
        positions=documents * work.positions,
        targets=documents * work.targets,
        flops=documents * flops,
        model_flops=documents * sizes.flops.of_the_model(work, blocks_train=blocks_train),
        activations=documents * activations,
        logits=documents * work.targets * sizes.config.vocabulary.size * 4,
    )


def _image(level: int, options: PlanOptions, sizes: _Sizes, run: Run) -> Image:
    grids = sizes.schedule.grids(level)
    # The engine computes the head's rows of codes alone.
    flops = FlopsModel(shape=sizes.shape, vocabulary_size=sizes.config.codebook_size, code_dim=sizes.config.code_dim)
    steps = generation_work(grids, prompt=1 + options.text)
    total = sum(steps, Work())
    cache = cache_bytes(sizes.shape, total.positions, compute_bytes=run.compute_bytes)
    once = sum(flops.forward(step).total for step in steps)
    return Image(
        level=level,
        pixels=sizes.schedule.pixels(level),
        codes=num_codes_of(grids),
        steps=len(steps),
        flops=once,
        # The unconditional row is padded to the conditional one, and computed as wide.
        flops_guided=2 * once,
        cache=cache,
        cache_guided=2 * cache,
    )
