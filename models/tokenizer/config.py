"""Configuration of the dual-codebook tokenizer (NextFlow sections 2.1 and 3.1; values the paper omits follow TokenFlow)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from nextflow.sequence.scales import ScaleSchedule


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """The convolutional encoder and decoder of the pixel branch."""

    layout: Literal["vqgan", "patchified"] = "vqgan"
    """`vqgan`: strided convolutions down, nearest up-sampling up. `patchified`: pixel-unshuffle and pixel-shuffle instead."""
    width: int = 128
    """Channels at the highest resolution."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution in units of `width`, high to low; every step halves the resolution."""
    num_blocks: int = 2
    """Residual blocks per resolution."""
    stem: int = 1
    """Pixel-unshuffle factor before the first convolution: 4 keeps every convolution at 1/4 resolution or below."""
    attention: bool = True
    """Residual block, self-attention, residual block at the lowest resolution; off leaves all three out."""
    latent_width: int = 256
    """Channels between the convolutions and the code channels."""
    groups: int = 32
    """Groups of each GroupNorm; must divide every width."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(int(value) for value in self.multipliers))
        for multiplier in self.multipliers:
            if (self.width * multiplier) % self.groups:
                raise ValueError(
                    f"pixel.groups {self.groups} must divide pixel.width x multiplier {self.width * multiplier}"
                )

    @property
    def stride(self) -> int:
        """Pixels per cell of the encoder's output."""
        return self.stem * 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """The SigLIP 2 vision tower (NaFlex: any grid) and the small transformer that decodes back to its features."""

    width: int = 1152
    """Width of the vision tower."""
    mlp_width: int = 4304
    """Hidden width of the tower's MLPs."""
    num_layers: int = 27
    """Layers of the published tower; those above `hidden_state` are not built."""
    num_heads: int = 16
    """Attention heads of the tower."""
    num_patches: int = 256
    """Entries of the tower's square table of position embeddings; it is resized to each grid."""
    hidden_state: int = -2
    """Which of the tower's hidden states is the feature, counted as `output_hidden_states` counts: -2 is the second to last,
    0 the embeddings. The last one is taken behind the tower's last norm."""
    decoder_layers: int = 3
    """Layers of the semantic decoder."""
    decoder_width: int = 1152
    """Width of the semantic decoder."""
    decoder_heads: int = 12
    """Attention heads of the semantic decoder."""

    def __post_init__(self) -> None:
        if not -self.num_layers - 1 <= self.hidden_state <= self.num_layers:
            raise ValueError(f"semantic.hidden_state {self.hidden_state} does not exist in {self.num_layers} layers")
        if self.width % self.num_heads or self.decoder_width % self.decoder_heads:
            raise ValueError("semantic.num_heads must divide semantic.width, and decoder_heads decoder_width")

    @property
    def depth(self) -> int:
        """Number of tower layers below the chosen hidden state."""
        return self.hidden_state if self.hidden_state >= 0 else self.num_layers + 1 + self.hidden_state


TRAINING_ONLY = (
    "beta",
    "revive_interval",
    "revive_below",
    "usage_decay",
    "codebook_update",
    "ema_decay",
    "entropy_temperature",
)
"""Fields of `TokenizerConfig` that steer training alone: codes and shapes of weights do not depend on them."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Everything that decides a tokenizer's architecture. The defaults are the paper's, or TokenFlow's where it is silent."""

    schedule: ScaleSchedule = field(default_factory=ScaleSchedule)
    """Grids of all scales per level and aspect ratio; its stride is the pixels per code."""
    codebook_size: int = 32768
    """Number of codes. The paper states 16,384 for its ablation and none for the 7B model; TokenFlow has 32,768."""
    semantic_dim: int = 32
    """Channels of a semantic entry; counts as 0 where `semantic` is null."""
    pixel_dim: int = 8
    """Channels of a pixel entry."""
    semantic: SemanticConfig | None = field(default_factory=SemanticConfig)
    """The semantic branch; null leaves the pixel branch alone (the first training stage)."""
    pixel: PixelConfig = field(default_factory=PixelConfig)
    """The pixel branch."""
    decoder_capacity: int = 1
    """1, or 2 for a pixel decoder of twice the channels and twice the blocks (the third training stage)."""
    semantic_weight: float = 1.0
    """Weight of the semantic distance in the joint look-up."""
    pixel_weight: float = 1.0
    """Weight of the pixel distance in the joint look-up (TokenFlow's w_dis)."""
    normalize: bool = True
    """L2-normalise features and entries, each part on its own, before comparing them."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    revive_interval: int = 50
    """Training steps between two searches for dead entries, which move to badly quantised features; 0 leaves them dead."""
    revive_below: float = 0.02
    """An entry is dead when its running share of uses falls below this fraction of an even share."""
    usage_decay: float = 0.99
    """Decay per training step of the running share of uses."""
    codebook_update: Literal["gradient", "ema"] = "gradient"
    """What moves the entries: the codebook loss, or (`ema`) a running mean of the vectors they stand for."""
    ema_decay: float = 0.99
    """Decay per training step of that running mean."""
    entropy_temperature: float = 0.1
    """Temperature of the soft choice of codes in the entropy loss, over weighted squared distances (ours)."""

    def __post_init__(self) -> None:
        if self.pixel.stride != self.schedule.stride:
            raise ValueError(
                f"pixel.stem and pixel.multipliers give a stride of {self.pixel.stride}, "
                f"but schedule.stride is {self.schedule.stride}"
            )
        if self.decoder_capacity not in (1, 2):
            raise ValueError(f"decoder_capacity must be 1 or 2, got {self.decoder_capacity}")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.usage_decay < 1:
            raise ValueError(
                f"ema_decay {self.ema_decay} and usage_decay {self.usage_decay} must be at least 0 and below 1"
            )
        if self.codebook_update not in ("gradient", "ema"):
            raise ValueError(f"codebook_update must be 'gradient' or 'ema', got {self.codebook_update!r}")
        if self.entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature must be above 0, got {self.entropy_temperature}")
        if self.semantic is not None and self.semantic_dim < 1:
            raise ValueError("semantic_dim must be at least 1 where the semantic branch exists")

    @property
    def code_dims(self) -> tuple[int, int]:
        """Semantic and pixel channels of a code vector."""
        return (0 if self.semantic is None else self.semantic_dim), self.pixel_dim

    def to_dict(self) -> dict:
        """Plain JSON types; `from_dict` is the inverse."""
        values = asdict(self)
        values["schedule"] = self.schedule.to_dict()
        values["pixel"]["multipliers"] = list(self.pixel.multipliers)
        return values

    @classmethod
    def from_dict(cls, values: dict) -> TokenizerConfig:
        """Rebuild a configuration from `to_dict`; unknown keys raise TypeError."""
        values = dict(values)
        values["schedule"] = ScaleSchedule.from_dict(values["schedule"])
        values["pixel"] = PixelConfig(**values["pixel"])
        if values["semantic"] is not None:
            values["semantic"] = SemanticConfig(**values["semantic"])
        return cls(**values)
