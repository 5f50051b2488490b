"""The decoder-only transformer: text by next token, images by next scale (paper sections 2.2 and 3).

    x(text id)            = token_embedding[id]
    x(<boi>)              = boundary_embedding[0] + scale_embedding[1] + sinusoid(number of scales)
    x(cell of block k)    = connector(code vectors of scale k-1, resized) + scale_embedding[k] + sinusoid(number of scales)
    hidden                = norm(blocks(x));   logits = head(hidden)

The codes of each scale are looked up alone, without accumulating coarser ones (residual features); the resize is a gather of
the code vectors at `tap_index` weighted by `tap_weight`, so images of any mix of grids are one operation.

Deliberately absent: QK-norm, dropout, tied embeddings, sliding windows.

Shapes: B rows, L packed length, N new positions, W width, M image positions, T taps, C channels of a code, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextflow.kernels.attention import Implementation, Visibility, prepare
from nextflow.kernels.linear_cross_entropy import LinearCrossEntropy
from nextflow.kernels.rope import Rotation, rope_cos_sin
from nextflow.models.transformer.attention import DecodeCache, SelfAttention
from nextflow.models.transformer.block import Block, RMSNorm
from nextflow.models.transformer.config import TransformerConfig
from nextflow.models.transformer.head import DualHead, SingleHead
from nextflow.models.transformer.rows import copy_rows, draw_rows
from nextflow.sequence.layout import PackedRows


class Inputs(Protocol):
    """What a position is made of: the fields of `PackedRows` that `embed` reads."""

    @property
    def ids_BL(self) -> Tensor: ...
    @property
    def scale_BL(self) -> Tensor: ...
    @property
    def num_scales_BL(self) -> Tensor: ...
    @property
    def input_code_N(self) -> Tensor: ...
    @property
    def input_position_M(self) -> Tensor: ...
    @property
    def tap_index_MT(self) -> Tensor: ...
    @property
    def tap_weight_MT(self) -> Tensor: ...


class Transformer(nn.Module):
    """Qwen2.5's decoder over interleaved text and images.

    Training calls `forward` and `cross_entropy`; decoding calls `embed`, `step` and the head.

    Args:
        config: shape and vocabulary.
        seed: of the initial weights; null draws one from torch's generator.
    """

    head: SingleHead | DualHead
    num_scales_table: Tensor

    def __init__(self, config: TransformerConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        self.attention: Implementation = "auto"
        W = config.width
        self.token_embedding = nn.Embedding(config.text_size, W)
        self.boundary_embedding = nn.Embedding(2, W)
        self.code_embedding = nn.Embedding(config.codebook_size, config.code_dim)
        self.connector = nn.Sequential(nn.Linear(config.code_dim, W), nn.GELU(), nn.Linear(W, W))
        # Row 0 is text: zero, and without gradient. Row K + 1 marks the last scale's
        # own codes (`layout.feed_last_scale`), hence one row more than scales.
        self.scale_embedding = nn.Embedding(config.max_scales + 2, W, padding_idx=0)
        self.register_buffer("num_scales_table", torch.empty(config.max_scales + 1, W), persistent=False)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.num_layers)])
        self.norm = RMSNorm(W, config.norm_eps)
        self.head = SingleHead(W, self.vocabulary) if config.head == "single" else DualHead(W, self.vocabulary)
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Draw all weights anew; also fills the sinusoidal table, so call it after `to_empty` on a model built on meta.

        Each parameter has a seed of its own, so that sharded weights are those of one process. Without `seed` it is drawn
        from torch's generator.

        | parameter                                   | distribution                                   |
        | token, boundary, scale embedding, head      | N(0, s), s = config.init_std; scale row 0 is 0 |
        | qkv_proj, gate_up_proj                      | N(0, s); biases 0                              |
        | o_proj, down_proj (write to the stream)     | N(0, s / sqrt(2 layers))                       |
        | code_embedding                              | N(0, 1 / sqrt(C)), then `initialize_codes`     |
        | connector, first layer                      | N(0, 1 / sqrt(2)): unit outputs for two unit vectors |
        | connector, second layer                     | N(0, 2 s / sqrt(W)): outputs of about s        |
        | norms                                       | 1                                              |
        | sinusoid of the number of scales (no parameter) | root mean square s                         |
        """
        if self.num_scales_table.is_meta:
            return
        self.init_table()
        s, layers = self.config.init_std, self.config.num_layers
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                draw_rows(parameter, s / math.sqrt(2 * layers), seed, name)
            elif name == "code_embedding.weight":
                draw_rows(parameter, parameter.shape[1] ** -0.5, seed, name)
            elif name == "connector.0.weight":
                draw_rows(parameter, 2**-0.5, seed, name)
            elif name == "connector.2.weight":
                draw_rows(parameter, 2 * s / math.sqrt(parameter.shape[1]), seed, name)
            else:
                draw_rows(parameter, s, seed, name)
        copy_rows(self.scale_embedding.weight, torch.zeros(1, self.config.width))

    def init_table(self) -> None:
        """Fill the sinusoidal table, which no checkpoint holds."""
        scale = self.config.init_std * math.sqrt(2)
        self.num_scales_table.copy_(_sinusoids(self.config.max_scales + 1, self.config.width) * scale)

    @torch.no_grad()
    def initialize_codes(self, vectors_KC: Tensor) -> None:
        """Take the tokenizer's codebook vectors as code embeddings (paper 2.2).

        Raises ValueError when their shape is not [codebook_size, code_dim].
        """
        if vectors_KC.shape != self.code_embedding.weight.shape:
            raise ValueError(
                f"the tokenizer's codebook is {tuple(vectors_KC.shape)}, "
                f"the transformer's code embedding {tuple(self.code_embedding.weight.shape)}"
            )
        copy_rows(self.code_embedding.weight, vectors_KC)

    def set_attention(self, implementation: Implementation) -> None:
        """Choose the attention kernel of packed batches: "auto", "sdpa", "dense", "spans", "flex" or "flash"."""
        self.attention = implementation
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.implementation = implementation

    # Training

    def forward(self, rows: PackedRows) -> Tensor:
        """Hidden states [B, L, W] of a packed batch, final norm applied."""
        visibility = Visibility(rows.document_BL, rows.block_BL)
        prepare(visibility, self.attention, rows.document_BL.device)
        x_BLW = self._inputs(rows)
        rotation = self._rotation(rows.position_3BL, x_BLW)
        for block in self.blocks:
            x_BLW = block(x_BLW, rotation, visibility)
        return self.norm(x_BLW)

    def embed(self, rows: Inputs) -> Tensor:
        """Inputs [B, L, W] of a packed batch, or of a window of decoding."""
        return self._inputs(rows)  # which `forward` calls itself: a method that FSDP2 knows of must not call another

    def _inputs(self, rows: Inputs) -> Tensor:
        x_BLW = self.embed_tokens(rows.ids_BL)
        vectors = self.code_embedding.weight
        feature_MC = F.embedding_bag(
            rows.input_code_N[rows.tap_index_MT],
            vectors,
            per_sample_weights=rows.tap_weight_MT.to(vectors.dtype),
            mode="sum",
        )
        image_MW = self.connector(feature_MC).to(x_BLW.dtype)
        x_BLW = x_BLW.flatten(0, 1).index_copy(0, rows.input_position_M, image_MW).view_as(x_BLW)
        return x_BLW + self._scale_mark(rows.scale_BL, rows.num_scales_BL)

    def embed_tokens(self, ids_BN: Tensor) -> Tensor:
        """Inputs [B, N, W] of text ids, <boi> and <eoi> (ids below `vocabulary.code_offset`), without the mark of a scale."""
        boundary_BN = ids_BN - self.config.text_size
        return torch.where(
            (boundary_BN >= 0)[..., None],
            self.boundary_embedding(boundary_BN.clamp(min=0)),
            self.token_embedding(ids_BN.clamp(max=self.config.text_size - 1)),
        )

    def cross_entropy(
        self, hidden_BLW: Tensor, target_BL: Tensor, weight_BL: Tensor | None = None, *, entropy: bool = False
    ) -> LinearCrossEntropy:
        """Loss and correctness of each position, flat [B * L], and the total; targets of -100 are ignored.

        With weights gradients flow from the total alone, which is cheaper; without them from all, as GRPO wants.
        """
        weight_N = None if weight_BL is None else weight_BL.flatten()
        return self.head.cross_entropy(hidden_BLW.flatten(0, -2), target_BL.flatten(), weight_N, entropy=entropy)

    # Decoding

    def step(self, x_BNW: Tensor, position_3BN: Tensor, cache: DecodeCache) -> Tensor:
        """Hidden states [B, N, W] of new positions, which attend to the cache and to each other as the cache says.

        Args:
            x_BNW: inputs from `embed`.
            position_3BN: their rotary positions.
            cache: keys and values so far; every layer appends to it.
        """
        rotation = self._rotation(position_3BN, x_BNW)
        for block in self.blocks:
            x_BNW = block(x_BNW, rotation, None, cache)
        return self.norm(x_BNW)

    def text_logits(self, hidden_BNW: Tensor) -> Tensor:
        """Logits [..., U] of text ids, <boi> and <eoi> alone."""
        return self.head.text_logits(hidden_BNW)

    def code_logits(self, hidden_BNW: Tensor) -> Tensor:
        """Logits [..., K] of codes alone."""
        return self.head.code_logits(hidden_BNW)

    def logits(self, hidden_BNW: Tensor) -> Tensor:
        """Logits [..., V] over the whole vocabulary."""
        return self.head(hidden_BNW)

    def _rotation(self, position_3BL: Tensor, x: Tensor) -> Rotation:
        config, device = self.config, x.device.type
        rotation = rope_cos_sin(position_3BL, config.head_dim, config.rope_theta, config.rope_sections)
        # Asking about autocast raises on the meta device, which knows none.
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return rotation.to(torch.get_autocast_dtype(device) if autocast else x.dtype)

    def _scale_mark(self, scale_BL: Tensor, num_scales_BL: Tensor) -> Tensor:
        return self.scale_embedding(scale_BL) + F.embedding(num_scales_BL, self.num_scales_table)


def _sinusoids(rows: int, width: int) -> Tensor:
    """sin and cos of n * 10000^(-2i/width), n = 0 .. rows-1; row 0 stands for text and is zero."""
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angle = torch.arange(rows)[:, None] * frequency
    table = torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :width]
    table[0] = 0.0
    return table
