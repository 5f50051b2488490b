"""Multi-scale residual quantiser with a dual codebook (TokenFlow's shared mapping; NextFlow section 2.1).

For each scale k, coarse to fine, with the residual r (at first the features themselves):

    z_k = normalise(area(r, grid_k))        each part on its own
    i_k = argmin_i  w_sem * |z_sem - e_sem,i|^2 + w_pix * |z_pix - e_pix,i|^2
    u_k = bicubic(e_{i_k}, last grid)       sum += u_k      r -= u_k (detached)

The sum replaces the features, with the gradient passed straight through. There are no convolutions between scales.
Everything is fp32 whatever the autocast, as the paper asks.

B images, N codes of an image over all scales, K codebook entries, S semantic and P pixel channels, C = S + P, HxW last
grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextflow.kernels.codebook import nearest_code, nearest_codes
from nextflow.models.tokenizer.codebook_average import CodebookAverage
from nextflow.models.tokenizer.codebook_health import CodebookHealth
from nextflow.models.tokenizer.entropy import entropy_loss
from nextflow.models.tokenizer.resample import resample
from nextflow.sequence.correction import Correction
from nextflow.sequence.scales import Grid, num_codes_of


class QuantizerOutput(NamedTuple):
    """What training needs of the quantiser."""

    quantized: Tensor
    """[B, C, H, W]: the sum over scales, with the gradient of the features."""
    indices: Tensor
    """[B, N] int64; -1 at the codes of dropped scales."""
    codebook_loss: Tensor
    """mean (e - sg z)^2, averaged over the scales used; 0 where running means move the codebooks."""
    commitment_loss: Tensor
    """beta * mean (sg e - z)^2, averaged over the scales used."""
    residual_loss: Tensor
    """mean (f - sg sum)^2: what the scales together leave of the features f. Normalised vectors say nothing of a feature's
    length, so without it features outgrow the sum of unit entries and every scale repeats the first."""
    entropy_loss: Tensor | None = None
    """Entropy of each vector's soft choice of a code minus that of all choices together (`entropy`), when asked for."""


class Encoding(NamedTuple):
    """Codes of a batch of images. They differ only under self-correction."""

    input_codes_BN: Tensor
    """int64: the codes a generator is fed."""
    target_codes_BN: Tensor
    """int64: the codes a generator should predict: the nearest entries, given the codes fed before."""
    error_S2: Tensor | None = None
    """[S, 2]: mean squared distance of the normalised residual to the fed entry, per scale, semantic (nan where there
    is none) and pixel part."""


class ScaleStep(NamedTuple):
    """One scale of the residual loop."""

    vectors_NC: Tensor
    """Normalised residual at this scale's grid, rows in order (image, row, column); carries the features' gradient."""
    entries_NC: Tensor
    """The fed codes' entries; carry the codebook's gradient."""
    target_BN: Tensor
    fed_BN: Tensor
    upsampled_BCHW: Tensor
    """The entries resized to the last grid, without gradient."""


class DualCodebookQuantizer(nn.Module):
    """Residual quantiser over scales; one index selects an entry in the semantic and in the pixel codebook.

    `forward` reads features [B, semantic_dim + pixel_dim, H, W], semantic channels first. `semantic_dim` 0 leaves the
    pixel part alone.
    """

    def __init__(
        self,
        codebook_size: int,
        semantic_dim: int,
        pixel_dim: int,
        *,
        semantic_weight: float = 1.0,
        pixel_weight: float = 1.0,
        normalize: bool = True,
        beta: float = 0.25,
        revive_interval: int = 0,
        revive_below: float = 0.02,
        usage_decay: float = 0.99,
        codebook_update: Literal["gradient", "ema"] = "gradient",
        ema_decay: float = 0.99,
        entropy_temperature: float = 0.1,
    ) -> None:
        super().__init__()
        self.semantic_dim, self.pixel_dim = semantic_dim, pixel_dim
        self.semantic_weight, self.pixel_weight = semantic_weight, pixel_weight
        self.normalize, self.beta, self.entropy_temperature = normalize, beta, entropy_temperature
        by_gradient = codebook_update == "gradient"
        self.semantic_codebook = nn.Parameter(
            torch.randn(codebook_size, semantic_dim), requires_grad=by_gradient and semantic_dim > 0
        )
        self.pixel_codebook = nn.Parameter(torch.randn(codebook_size, pixel_dim), requires_grad=by_gradient)
        self.average = None if by_gradient else CodebookAverage(codebook_size, ema_decay)
        self.health = CodebookHealth(codebook_size, interval=revive_interval, below=revive_below, decay=usage_decay)

    @property
    def codebook_size(self) -> int:
        """Number of codes K."""
        return len(self.pixel_codebook)

    @property
    def code_dim(self) -> int:
        """Channels of a code vector: semantic, then pixel."""
        return self.semantic_dim + self.pixel_dim

    def forward(
        self,
        features_BCHW: Tensor,
        grids: Sequence[Grid],
        keep: Sequence[bool] | None = None,
        entropy: bool = False,
    ) -> QuantizerOutput:
        """Quantise features over all scales. While training, ranks call it together; their batches and grids may differ.

        Args:
            features_BCHW: [B, C, H, W], H x W = grids[-1].
            grids: grids of all scales, coarse to fine.
            keep: for each scale whether it is used (scale dropout); a dropped scale adds nothing, and the first is
                always used.
            entropy: whether to compute the entropy loss.

        Raises ValueError when the features' size is not the last grid.
        """
        with torch.autocast(features_BCHW.device.type, enabled=False):
            features_BCHW = features_BCHW.float()
            if self.training:
                self.health.refresh(self, features_BCHW.detach(), grids)
            total_BCHW = torch.zeros_like(features_BCHW)
            used, indices = [], []
            for scale, step in self.scales(features_BCHW, grids, keep):
                if step is None:
                    height, width = grids[scale]
                    indices.append(torch.full((len(features_BCHW), height * width), -1, device=features_BCHW.device))
                    continue
                used.append(step)
                indices.append(step.target_BN)
                total_BCHW = total_BCHW + step.upsampled_BCHW
            indices_BN = torch.cat(indices, dim=1)
            commitment = [F.mse_loss(step.vectors_NC, step.entries_NC.detach()) for step in used]
            output = QuantizerOutput(
                quantized=features_BCHW + (total_BCHW - features_BCHW).detach(),
                indices=indices_BN,
                codebook_loss=self._codebook_loss(used),
                commitment_loss=self.beta * torch.stack(commitment).mean(),
                residual_loss=F.mse_loss(features_BCHW, total_BCHW.detach()),
                entropy_loss=self._entropy_loss(used) if entropy else None,
            )
            if self.training:
                self.health.count(indices_BN)
                if self.average is not None:
                    vectors_MC = torch.cat([step.vectors_NC.detach() for step in used])
                    self.average.update(self, vectors_MC, torch.cat([step.target_BN.flatten() for step in used]))
            return output

    @torch.no_grad()
    def encode(
        self,
        features_BCHW: Tensor,
        grids: Sequence[Grid],
        correction: Correction | None = None,
        seed_B: Tensor | None = None,
    ) -> Encoding:
        """Codes of features; with `correction`, an image's draws are a function of its seed (`Correction.seeds`)."""
        with torch.autocast(features_BCHW.device.type, enabled=False):
            loop = self.scales(features_BCHW.float(), grids, correction=correction, seed_B=seed_B)
            steps = [step for _, step in loop if step is not None]
            return Encoding(
                torch.cat([step.fed_BN for step in steps], dim=1),
                torch.cat([step.target_BN for step in steps], dim=1),
                torch.stack([self._errors_2(step) for step in steps]),
            )

    def lookup(self, indices: Tensor) -> Tensor:
        """Entries of codes: int64 [...] -> fp32 [..., C], each part normalised where `normalize` is set."""
        return F.embedding(indices, self.entries_KC())

    def reconstruct(self, indices_BN: Tensor, grids: Sequence[Grid], num_scales: int | None = None) -> Tensor:
        """Sum over scales of the entries resized to the last grid, [B, C, H, W]; `num_scales` stops after the first few.

        Raises ValueError when the number of codes does not fit the grids.
        """
        grids_used = grids[:num_scales]
        if indices_BN.shape[1] < num_codes_of(tuple(grids_used)):
            raise ValueError(f"{indices_BN.shape[1]} codes per image do not fill the grids {grids_used}")
        if num_scales is None and indices_BN.shape[1] != num_codes_of(tuple(grids)):
            raise ValueError(f"{indices_BN.shape[1]} codes per image are too many for the grids {grids}")
        with torch.autocast(indices_BN.device.type, enabled=False):
            entries_BNC = self.lookup(indices_BN)
            total_BCHW = entries_BNC.new_zeros(len(entries_BNC), self.code_dim, *grids[-1])
            start = 0
            for height, width in grids_used:
                map_BChw = entries_BNC[:, start : start + height * width].mT.unflatten(-1, (height, width))
                total_BCHW = total_BCHW + resample(map_BChw, grids[-1], "bicubic")
                start += height * width
            return total_BCHW

    def entries_KC(self) -> Tensor:
        """All entries as they are compared and decoded, semantic channels first."""
        return self.normalized(torch.cat([self.semantic_codebook, self.pixel_codebook], dim=1).float())

    def normalized(self, vectors_NC: Tensor) -> Tensor:
        """L2-normalise each part on its own; the identity when `normalize` is off."""
        if not self.normalize:
            return vectors_NC
        semantic_NS, pixel_NP = vectors_NC.split([self.semantic_dim, self.pixel_dim], dim=-1)
        pixel_NP = F.normalize(pixel_NP, dim=-1)
        return torch.cat([F.normalize(semantic_NS, dim=-1), pixel_NP], dim=-1) if self.semantic_dim else pixel_NP

    def scales(
        self,
        features_BCHW: Tensor,
        grids: Sequence[Grid],
        keep: Sequence[bool] | None = None,
        correction: Correction | None = None,
        seed_B: Tensor | None = None,
    ) -> Iterator[tuple[int, ScaleStep | None]]:
        """The residual loop: yields (scale, step), coarse to fine; the step of a dropped scale is None."""
        if tuple(features_BCHW.shape[-2:]) != tuple(grids[-1]):
            raise ValueError(
                f"features of {tuple(features_BCHW.shape[-2:])} cells do not fit the last grid {grids[-1]}"
            )
        entries_KC = self.entries_KC()
        residual_BCHW = features_BCHW
        images = len(features_BCHW)
        if (correction is None) != (seed_B is None):
            raise ValueError("self-correction needs a seed for each image, and nothing else does: see Correction.seeds")
        for scale, (height, width) in enumerate(grids):
            if keep is not None and scale > 0 and not keep[scale]:
                yield scale, None
                continue
            map_BChw = resample(residual_BCHW, (height, width), "area")
            vectors_NC = self.normalized(map_BChw.permute(0, 2, 3, 1).reshape(-1, self.code_dim))
            target_BN = self.nearest(vectors_NC, entries_KC).view(images, -1)
            fed_BN = target_BN
            if correction is not None and seed_B is not None:
                near = nearest_codes(
                    *self._parts(vectors_NC),
                    *self._parts(entries_KC),
                    self.semantic_weight,
                    self.pixel_weight,
                    correction.top_k,
                )
                chosen_B = correction.chosen(seed_B)
                fed_BN = correction.fed_codes(scale, near.distance_NT, near.index_NT, target_BN, seed_B, chosen_B)
            entries_NC = F.embedding(fed_BN.flatten(), entries_KC)
            entries_BChw = entries_NC.detach().view(-1, height, width, self.code_dim).permute(0, 3, 1, 2)
            upsampled_BCHW = resample(entries_BChw, grids[-1], "bicubic")
            residual_BCHW = residual_BCHW - upsampled_BCHW
            yield scale, ScaleStep(vectors_NC, entries_NC, target_BN, fed_BN, upsampled_BCHW)

    def nearest(self, vectors_NC: Tensor, entries_KC: Tensor) -> Tensor:
        """Joint look-up, int64 [N]."""
        return nearest_code(*self._parts(vectors_NC), *self._parts(entries_KC), self.semantic_weight, self.pixel_weight)

    def _codebook_loss(self, used: list[ScaleStep]) -> Tensor:
        if self.average is not None:
            return used[0].vectors_NC.new_zeros(())
        return torch.stack([F.mse_loss(step.entries_NC, step.vectors_NC.detach()) for step in used]).mean()

    def _entropy_loss(self, used: list[ScaleStep]) -> Tensor:
        vectors_NC = torch.cat([step.vectors_NC for step in used])
        weights = [self.semantic_weight] * self.semantic_dim + [self.pixel_weight] * self.pixel_dim
        root_C = torch.tensor(weights, device=vectors_NC.device).sqrt()
        return entropy_loss(vectors_NC * root_C, self.entries_KC() * root_C, self.entropy_temperature)

    def _errors_2(self, step: ScaleStep) -> Tensor:
        square_NC = (step.vectors_NC - step.entries_NC).square()
        parts = square_NC.split([self.semantic_dim, self.pixel_dim], dim=1)
        return torch.stack([part.sum(1).mean() if part.shape[1] else part.new_full((), torch.nan) for part in parts])

    def _parts(self, vectors_NC: Tensor) -> tuple[Tensor, Tensor]:
        semantic_NS, pixel_NP = vectors_NC.detach().split([self.semantic_dim, self.pixel_dim], dim=1)
        return semantic_NS, pixel_NP
