"""The tokenizer: two encoders, one quantiser, two decoders (NextFlow sections 2.1 and 3.1).

    images -> semantic features (SigLIP 2) | pixel features (CNN) -> DualCodebookQuantizer -> codes
    quantised pixel part -> images          quantised semantic part -> the teacher's features

B images, N codes per image over all scales, C = semantic + pixel code channels, H x W pixels, h x w cells of the last
grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nextflow.models.tokenizer.config import TRAINING_ONLY, TokenizerConfig
from nextflow.models.tokenizer.pixel import PixelDecoder, PixelEncoder
from nextflow.models.tokenizer.quantizer import DualCodebookQuantizer, Encoding, QuantizerOutput
from nextflow.models.tokenizer.semantic import SemanticDecoder, SemanticEncoder
from nextflow.sequence.correction import Correction
from nextflow.sequence.scales import Grid


class TokenizerOutput(NamedTuple):
    """What training needs of one pass."""

    images_BCHW: Tensor
    """Reconstruction, about [-1, 1], not clamped."""
    semantic_BND: Tensor | None
    """Decoded semantic features, to be compared with the teacher's; None where they were not asked for."""
    quantizer: QuantizerOutput
    tower_BND: Tensor | None = None
    """Features of the semantic encoder's tower, before their projection; None without a semantic branch."""


class _Features(NamedTuple):
    code_BChw: Tensor
    tower_BND: Tensor | None


class Tokenizer(nn.Module):
    """Images <-> codes. All images of a call share `grids`, the grids of all scales from `config.schedule`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        semantic_dim, pixel_dim = config.code_dims
        if config.semantic is not None:
            self.semantic_encoder = SemanticEncoder(config.semantic, semantic_dim, config.schedule.stride)
            self.semantic_decoder = SemanticDecoder(config.semantic, semantic_dim)
        self.pixel_encoder = PixelEncoder(config.pixel, pixel_dim)
        self.pixel_decoder = PixelDecoder(config.pixel, pixel_dim, config.decoder_capacity)
        self.quantizer = DualCodebookQuantizer(
            config.codebook_size,
            semantic_dim,
            pixel_dim,
            semantic_weight=config.semantic_weight,
            pixel_weight=config.pixel_weight,
            normalize=config.normalize,
            beta=config.beta,
            revive_interval=config.revive_interval,
            revive_below=config.revive_below,
            usage_decay=config.usage_decay,
            codebook_update=config.codebook_update,
            ema_decay=config.ema_decay,
            entropy_temperature=config.entropy_temperature,
        )

    @property
    def schedule(self):
        """Grids of all scales per level and aspect ratio."""
        return self.config.schedule

    @property
    def code_dim(self) -> int:
        """Channels of a code vector: semantic, then pixel."""
        return self.quantizer.code_dim

    def forward(
        self,
        images_BCHW: Tensor,
        grids: Sequence[Grid],
        keep: Sequence[bool] | None = None,
        entropy: bool = False,
        *,
        decode_semantic: bool = True,
    ) -> TokenizerOutput:
        """Encode, quantise and decode images in [-1, 1].

        Args:
            images_BCHW: [B, 3, H, W], the size that `grids` asks for.
            grids: grids of all scales.
            keep: drops scales (`DualCodebookQuantizer.forward`).
            entropy: whether to compute the quantiser's entropy loss.
            decode_semantic: whether to run the semantic decoder, which only a semantic loss needs.
        """
        features = self._features(images_BCHW, grids)
        quantized = self.quantizer(features.code_BChw, grids, keep, entropy)
        semantic_BShw, pixel_BPhw = quantized.quantized.split(self.config.code_dims, dim=1)
        decode_semantic = decode_semantic and self.config.semantic is not None
        semantic_BND = self.semantic_decoder(semantic_BShw) if decode_semantic else None
        return TokenizerOutput(self.pixel_decoder(pixel_BPhw), semantic_BND, quantized, features.tower_BND)

    @torch.no_grad()
    def encode(
        self,
        images_BCHW: Tensor,
        grids: Sequence[Grid],
        correction: Correction | None = None,
        seed_B: Tensor | None = None,
    ) -> Encoding:
        """Codes of images in [-1, 1], int64 [B, N]. Draws of self-correction are functions of each image's seed."""
        return self.quantizer.encode(self.features(images_BCHW, grids), grids, correction, seed_B)

    @torch.no_grad()
    def decode(self, codes_BN: Tensor, grids: Sequence[Grid], num_scales: int | None = None) -> Tensor:
        """Images [B, 3, H, W] of codes, about [-1, 1], not clamped; `num_scales` shows the first few scales alone."""
        return self.decode_features(self.quantizer.reconstruct(codes_BN, grids, num_scales))

    def decode_features(self, quantized_BChw: Tensor) -> Tensor:
        """Images of quantised features [B, C, h, w]."""
        return self.pixel_decoder(quantized_BChw.split(self.config.code_dims, dim=1)[1])

    def features(self, images_BCHW: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Features before quantisation, [B, C, h, w], semantic channels first.

        Raises ValueError when the images' size is not the last grid times the stride.
        """
        return self._features(images_BCHW, grids).code_BChw

    def _features(self, images_BCHW: Tensor, grids: Sequence[Grid]) -> _Features:
        stride, (height, width) = self.schedule.stride, grids[-1]
        if tuple(images_BCHW.shape[-2:]) != (height * stride, width * stride):
            raise ValueError(
                f"images of {tuple(images_BCHW.shape[-2:])} pixels do not fit "
                f"the last grid {height} x {width} at stride {stride}"
            )
        pixel_BPhw = self.pixel_encoder(images_BCHW)
        if self.config.semantic is None:
            return _Features(pixel_BPhw, None)
        semantic = self.semantic_encoder(images_BCHW)
        code_BChw = torch.cat([semantic.code_BSHW.to(pixel_BPhw.dtype), pixel_BPhw], dim=1)
        return _Features(code_BChw, semantic.tower_BND)

    def fingerprint(self) -> str:
        """16 hexadecimal digits over everything that decides an image's codes: encoders, codebooks, and their configuration.

        Decoders are left out: codes stay valid while the pixel decoder is fine-tuned. With sharded weights (FSDP2) all ranks
        have to call it.
        """
        config = self.config.to_dict()
        for key in ("decoder_capacity", *TRAINING_ONLY):
            config.pop(key)
        if config["semantic"] is not None:
            config["semantic"] = {k: v for k, v in config["semantic"].items() if not k.startswith("decoder_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if not name.startswith(("pixel_decoder.", "semantic_decoder.", "quantizer.health.", "quantizer.average.")):
                digest.update(name.encode())
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                digest.update(whole.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
