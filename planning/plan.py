"""What a run will need, as numbers: every table of `python main.py plan` and its JSON are made from these."""

from __future__ import annotations

from dataclasses import dataclass, field

from nextflow.planning.run import Run
from nextflow.sequence.scales import Grid, ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What `plan` cannot read off a config, or should assume."""

    text_size: int | None = None
    """Number of text ids, where the folder of model.text_tokenizer is not there (Qwen2.5-VL: 151665)."""
    codebook_size: int | None = None
    """Number of codes, where the data does not say and the checkpoint of model.tokenizer is not there."""
    code_dim: int | None = None
    """Channels of a code vector, where the checkpoint of model.tokenizer is not there; 40 if not given."""
    semantic_from_config: bool = False
    """Give the semantic tower the sizes of model.tokenizer.semantic, where the folder model.semantic_encoder is not there."""
    text: int = 100
    """Text ids of the document that steps are made of. The document that `plan` counts with: this text, then `images`."""
    images: int = 1
    """Square images of the document; 0 for text alone."""
    activation_checkpointing: bool | None = None
    """Whether blocks are computed again in the backward pass; null takes it from the callback FSDPSharding."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of one part of the model."""

    name: str
    total: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training batch of one device, at one stage of the curriculum."""

    level: int
    num_batches: int | None
    """Batches of the stage; None where the config leaves it open."""
    documents: float
    positions: float
    targets: float
    flops: float
    """Forward and backward, as executed."""
    model_flops: float
    """Three forward passes (two through frozen blocks): what a device's peak is compared with (MFU)."""
    activations: float
    """Bytes that the backward pass needs."""
    logits: float
    """Bytes that float32 logits would take; they are never made."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """Generating, or encoding, one square image of a level."""

    level: int
    pixels: tuple[int, int]
    codes: int
    steps: int
    """Forward passes."""
    flops: float = 0.0
    flops_guided: float = 0.0
    """With classifier-free guidance: two rows."""
    cache: float = 0.0
    """Bytes of keys and values."""
    cache_guided: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scale:
    """One scale of square images."""

    scale: int
    grid: Grid
    codes: int
    codes_so_far: int
    level: int | None
    """The level that ends here."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Images of one aspect ratio at every level."""

    ratio: float
    """Height / width of the base grid."""
    base_grid: Grid
    pixels: dict[int, tuple[int, int]]
    codes: dict[int, int]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about one run."""

    model: str
    run: Run
    parameters: list[Part]
    memory: dict[str, float]
    """Bytes on each device while it trains, by what takes them; of a config that does not train, the weights alone."""
    steps: list[Step]
    images: list[Image]
    scales: list[Scale]
    ratios: list[Ratio]
    notes: list[str] = field(default_factory=list)
    """What was assumed, and what was left out."""

    @property
    def num_parameters(self) -> int:
        """Of all parts."""
        return sum(part.total for part in self.parameters)

    @property
    def num_trained(self) -> int:
        """Of all parts."""
        return sum(part.trained for part in self.parameters)


def scales_of(schedule: ScaleSchedule) -> list[Scale]:
    """The scales of square images, coarse to fine."""
    ends = {count: level for level, count in schedule.levels.items()}
    scales, total = [], 0
    for number, (height, width) in enumerate(schedule.grids(max(schedule.levels)), start=1):
        total += height * width
        scales.append(
            Scale(
                scale=number,
                grid=(height, width),
                codes=height * width,
                codes_so_far=total,
                level=ends.get(number),
            )
        )
    return scales


def ratios_of(schedule: ScaleSchedule) -> list[Ratio]:
    """All aspect ratios of the schedule, in its order."""
    ratios = []
    for height, width in schedule.base_grids:
        ratio = height / width
        ratios.append(
            Ratio(
                ratio=ratio,
                base_grid=(height, width),
                pixels={level: schedule.pixels(level, ratio) for level in schedule.levels},
                codes={level: schedule.num_codes(level, ratio) for level in schedule.levels},
            )
        )
    return ratios
