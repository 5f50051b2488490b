"""Shape of the transformer: Qwen2.5's decoder, plus what image codes add to it (paper sections 2.2 and 3.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from nextflow.sequence.documents import Vocabulary


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What a user chooses. The defaults are the decoder of Qwen2.5-VL-7B."""

    width: int = 3584
    """Channels of the residual stream."""
    num_layers: int = 28
    """Decoder blocks."""
    num_heads: int = 28
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads, shared by groups of query heads; must divide num_heads."""
    head_dim: int = 128
    """Channels of a head."""
    mlp_width: int = 18944
    """Hidden channels of the gated MLP."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies. Qwen2.5-VL gives the axis w the lowest ones: with its 1e6 they turn by 0.003 over a whole
    image, which a trained Qwen amplifies and a model from scratch never finds. Small models want about 10."""
    rope_sections: tuple[int, int, int] = (16, 24, 24)
    """Frequencies given to the axes (t, h, w); they sum to head_dim / 2. Qwen2.5-VL's; the paper leaves it open."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    max_scales: int = 18
    """Most scales an image may have: size of the scale embedding."""
    head: Literal["single", "dual"] = "single"
    """One output head over text and codes (the paper's), or one for each (its ablation)."""
    init_std: float = 0.02
    """Standard deviation of new weights."""

    def __post_init__(self) -> None:
        # YAML gives a list.
        object.__setattr__(self, "rope_sections", tuple(self.rope_sections))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"transformer.num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if len(self.rope_sections) != 3 or 2 * sum(self.rope_sections) != self.head_dim:
            raise ValueError(
                f"transformer.rope_sections {self.rope_sections} must be three numbers "
                f"that sum to head_dim / 2 = {self.head_dim / 2}"
            )
        if self.head not in ("single", "dual"):
            raise ValueError(f"transformer.head is {self.head!r}; it must be 'single' or 'dual'")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(DecoderConfig):
    """All that a transformer is built from; the vocabulary comes from the text tokenizer and the image tokenizer."""

    text_size: int
    """Number of text ids."""
    codebook_size: int
    """Number of image codes."""
    code_dim: int
    """Channels of a codebook vector, semantic and pixel part together."""
    start_id: int
    """Text id that starts a document."""
    end_id: int
    """Text id that ends a document."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Ids of text, boundaries and codes."""
        return Vocabulary(
            text_size=self.text_size, codebook_size=self.codebook_size, start_id=self.start_id, end_id=self.end_id
        )

    @classmethod
    def resolve(cls, decoder: DecoderConfig, **vocabulary: Any) -> TransformerConfig:
        """Add the vocabulary's fields to what the user chose."""
        return cls(**{field.name: getattr(decoder, field.name) for field in fields(DecoderConfig)}, **vocabulary)

    @classmethod
    def qwen2_5_vl_7b(cls, *, codebook_size: int, code_dim: int = 40, **changes: Any) -> TransformerConfig:
        """The paper's backbone with a codebook of `codebook_size` entries; start and end are <|im_start|>, <|endoftext|>."""
        preset = {"text_size": 152064, "start_id": 151644, "end_id": 151643}
        return cls(codebook_size=codebook_size, code_dim=code_dim, **{**preset, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """Inverse of `to_dict`."""
        return cls(**values)
