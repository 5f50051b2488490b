"""Trains the image tokenizer in three stages (NextFlow section 3.1) and turns images into codes.

    pixel      the pixel branch alone
    joint      everything; pixel encoder, decoder and codebook from the pixel stage, semantic encoder from a SigLIP 2 folder
    decoder    the pixel decoder alone, doubled (`tokenizer.decoder_capacity: 2`), everything else frozen, from the joint stage

Steps: `trainer.global_step` counts optimiser steps, and Lightning would count the discriminator's too, so that
`max_steps` would end a run after half the batches. Here only the generator's steps are counted (the discriminator's
optimiser is stepped outside of Lightning's wrapper): `global_step`, `max_steps` and all schedules count batches, with
and without a discriminator.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from nextflow.lightning_modules.code_batch import CodeBatch
from nextflow.lightning_modules.optim import default_adam, warmup_cosine
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from nextflow.models.tokenizer.losses import (
    LossWeights,
    PerceptualLoss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    semantic_loss,
)
from nextflow.models.tokenizer.model import Tokenizer, TokenizerOutput
from nextflow.models.tokenizer.quantizer import Correction
from nextflow.models.tokenizer.semantic import SemanticTower, load_tower, read_semantic_config
from nextflow.models.tokenizer.stages import start_decoder, start_joint
from nextflow.models.tokenizer.usage import CodebookUsage
from nextflow.sequence.scales import ScaleSchedule


class TokenizerModule(L.LightningModule):
    """One training stage of the tokenizer; predicting yields codes.

    Callbacks may set `scale_keep`: for each scale whether the training step uses it (scale dropout), or None for all.

    Args:
        tokenizer: architecture. The semantic branch is left out in the pixel stage and takes its tower's sizes from
            `semantic_encoder`.
        stage: `pixel`, `joint` or `decoder`.
        init_from: checkpoint of the stage before (required by `decoder`; `joint` may start from nothing).
        semantic_encoder: folder of a Hugging Face Siglip2Model; required by `joint` while `losses.semantic` is above 0.
        losses: weight of each loss term.
        perceptual_weights: file with torchvision's VGG16 weights, required while `losses.perceptual` is above 0.
        discriminator: size of the patch discriminator, built while `losses.adversarial` is above 0.
        discriminator_start: batch from which discriminator and adversarial loss run.
        generator_optimizer: optimiser of everything but the discriminator.
        discriminator_optimizer: optimiser of the discriminator.
        warmup_steps: batches over which the learning rate rises; after them it falls to 0 as a cosine.
        total_steps: batches of the whole schedule; null takes them from the trainer (`max_steps`, or epochs times
            batches).
        gradient_clip: largest gradient norm of generator and discriminator each; set this, not
            `trainer.gradient_clip_val`.
        correction: self-correction of predicted codes (token shards then hold fed and target codes); null is off.
        correction_seed: the draws of self-correction are a function of this seed and the batch.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        stage: Literal["pixel", "joint", "decoder"] = "joint",
        init_from: str | None = None,
        semantic_encoder: str | None = None,
        losses: LossWeights = LossWeights(),  # noqa: B008 (frozen)
        perceptual_weights: str | None = None,
        discriminator: DiscriminatorConfig = DiscriminatorConfig(),  # noqa: B008 (frozen)
        discriminator_start: int = 0,
        generator_optimizer: OptimizerCallable = default_adam,
        discriminator_optimizer: OptimizerCallable = default_adam,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        gradient_clip: float = 1.0,
        correction: Correction | None = None,
        correction_seed: int = 0,
    ) -> None:
        super().__init__()
        has_teacher = stage == "joint" and losses.semantic > 0 and tokenizer.semantic is not None
        if has_teacher and semantic_encoder is None:
            raise ValueError("stage joint needs `semantic_encoder`, the folder of a Siglip2Model, or losses.semantic 0")
        self.save_hyperparameters(ignore=["generator_optimizer", "discriminator_optimizer"])
        self.stage, self.init_from, self.semantic_encoder = stage, init_from, semantic_encoder
        self.losses, self.discriminator_start = losses, discriminator_start
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer
        self.warmup_steps, self.total_steps, self.gradient_clip = warmup_steps, total_steps, gradient_clip
        self.correction, self.correction_seed = correction, correction_seed
        self.scale_keep: tuple[bool, ...] | None = None

        self.tokenizer = Tokenizer(_stage_config(tokenizer, stage, semantic_encoder))
        config = self.tokenizer.config
        self.teacher: SemanticTower | None = None
        if has_teacher and config.semantic is not None:
            self.teacher = SemanticTower(config.semantic, config.schedule.stride).requires_grad_(False)
        self.perceptual = PerceptualLoss(perceptual_weights) if losses.perceptual else None
        self.discriminator: Any = PatchDiscriminator(discriminator) if losses.adversarial else None
        self.automatic_optimization = self.discriminator is None
        if stage == "decoder":
            self.tokenizer.requires_grad_(False)
            self.tokenizer.pixel_decoder.requires_grad_(True)
        elif config.semantic is not None and not losses.semantic:  # nothing reads it, and DDP waits for its gradients
            self.tokenizer.semantic_decoder.requires_grad_(False)

        levels = [str(level) for level in config.schedule.levels]
        self.psnr: Any = nn.ModuleDict({level: PeakSignalNoiseRatio((0.0, 1.0), dim=(1, 2, 3)) for level in levels})
        self.ssim: Any = nn.ModuleDict({level: StructuralSimilarityIndexMeasure(data_range=1.0) for level in levels})
        self.usage = CodebookUsage(max(config.schedule.levels.values()), config.codebook_size)

    def setup(self, stage: str) -> None:
        """Start from the stage before, unless a checkpoint is about to be restored."""
        if stage != "fit" or self.trainer.ckpt_path is not None:
            return
        if self.discriminator is not None and str(self.trainer.precision).startswith("16"):
            raise ValueError(
                "trainer.precision 16 needs a gradient scaler, which a run with a discriminator bypasses; use bf16-mixed"
            )
        if self.stage == "decoder" and self.init_from is None:
            raise ValueError("stage decoder needs `init_from`, the checkpoint of the joint stage")
        if self.stage != "decoder" and self.semantic_encoder is not None and self.tokenizer.config.semantic is not None:
            load_tower(self.tokenizer.semantic_encoder.tower, self.semantic_encoder)
            if self.teacher is not None:
                self.teacher.load_state_dict(self.tokenizer.semantic_encoder.tower.state_dict())
        if self.init_from is not None:
            start = {"pixel": _start_same, "joint": start_joint, "decoder": start_decoder}[self.stage]
            start(self.tokenizer, load_tokenizer(self.init_from, key="init_from"))

    def train(self, mode: bool = True) -> TokenizerModule:
        """Frozen parts stay in evaluation mode: in the decoder stage everything but the pixel decoder."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        if self.perceptual is not None:
            self.perceptual.eval()
        if self.stage == "decoder":
            self.tokenizer.eval()
            self.tokenizer.pixel_decoder.train(mode)
        return self

    def configure_optimizers(self) -> Any:
        generator = self.generator_optimizer([p for p in self.tokenizer.parameters() if p.requires_grad])
        if self.discriminator is None:
            return generator
        return [generator, self.discriminator_optimizer(self.discriminator.parameters())]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        # not through Lightning, which refuses fused optimisers: they matter on the CPU
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The learning rate is a pure function of the batches seen."""
        total = self.total_steps or self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the learning-rate schedule has no end: set trainer.max_steps or model.total_steps")
        factor = warmup_cosine(self.global_step, warmup_steps=self.warmup_steps, total_steps=int(total))
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        images_BCHW = to_signed(batch.images)
        output = self.tokenizer(images_BCHW, batch.grids, self.scale_keep)
        terms = self._terms(images_BCHW, output)
        adversarial = self.discriminator is not None and self.global_step >= self.discriminator_start
        if adversarial:
            self.discriminator.requires_grad_(False)
            terms["adversarial"] = hinge_generator_loss(self.discriminator(output.images_BCHW))
        loss = sum(getattr(self.losses, name) * term for name, term in terms.items())
        if self.discriminator is not None:
            optimizers: Any = self.optimizers()
            self._update(optimizers[0], loss)
            if adversarial:
                terms["discriminator"] = self._discriminator_step(images_BCHW, output.images_BCHW.detach())
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images_BCHW))
        self.log_dict(
            {f"train/loss_{name}": term.detach() for name, term in terms.items()}, batch_size=len(images_BCHW)
        )
        return loss if self.automatic_optimization else None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """PSNR and SSIM of reconstructions from codes, in [0, 1], and the codes in use."""
        encoding = self.tokenizer.encode(to_signed(batch.images), batch.grids)
        decoded_BCHW = self.tokenizer.decode(encoding.target_codes_BN, batch.grids).float()
        decoded_BCHW, images_BCHW = decoded_BCHW.clamp(-1, 1) * 0.5 + 0.5, batch.images.float() / 255
        self.psnr[str(batch.level)].update(decoded_BCHW, images_BCHW)
        self.ssim[str(batch.level)].update(decoded_BCHW, images_BCHW)
        self.usage.update(encoding.target_codes_BN, batch.grids)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> CodeBatch:
        """Codes of a batch of images. Raises ValueError for a tokenizer that was never trained."""
        if not bool(self.tokenizer.quantizer.health.pixel_ready):
            raise ValueError("this tokenizer has no trained weights: give --ckpt_path")
        generator = None
        if self.correction is not None:
            generator = torch.Generator(self.device)
            generator.manual_seed(hash((self.correction_seed, self.global_rank, dataloader_idx, batch_idx)) % 2**63)
        encoding = self.tokenizer.encode(to_signed(batch.images), batch.grids, self.correction, generator)
        return CodeBatch(
            keys=batch.keys,
            names=batch.names,
            records=batch.records,
            codes_BN=encoding.target_codes_BN.cpu(),
            input_codes_BN=None if self.correction is None else encoding.input_codes_BN.cpu(),
            grids=batch.grids,
            level=batch.level,
            aspect_ratio=batch.aspect_ratio,
            split=batch.split,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Outside of fit, what only trains (teacher, discriminator, perceptual loss) may be absent from this config."""
        if self._trainer is not None and self.trainer.state.fn != "fit":
            ours, stored = self.state_dict(), checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in stored.items() if k.startswith("tokenizer.") or k in ours}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokenizer_config"] = self.tokenizer.config.to_dict()

    def _terms(self, images_BCHW: Tensor, output: TokenizerOutput) -> dict[str, Tensor]:
        """The unweighted loss terms that are on, by their name in `LossWeights`."""
        terms: dict[str, Tensor] = {}
        reconstruction_BCHW = output.images_BCHW.float()
        if self.losses.mse:
            terms["mse"] = F.mse_loss(reconstruction_BCHW, images_BCHW)
        if self.losses.l1:
            terms["l1"] = F.l1_loss(reconstruction_BCHW, images_BCHW)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction_BCHW, images_BCHW)
        if self.stage != "decoder" and self.losses.quantizer:
            terms["quantizer"] = output.quantizer.codebook_loss + output.quantizer.commitment_loss
        if self.stage != "decoder" and self.losses.residual:
            terms["residual"] = output.quantizer.residual_loss
        if self.teacher is not None and output.semantic_BND is not None:
            with torch.no_grad():
                teacher_BND = self.teacher(images_BCHW)
            terms["semantic"] = semantic_loss(output.semantic_BND, teacher_BND)
        return terms

    def _discriminator_step(self, images_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
        self.discriminator.requires_grad_(True)
        loss = hinge_discriminator_loss(self.discriminator(images_BCHW), self.discriminator(reconstruction_BCHW))
        optimizers: Any = self.optimizers(use_pl_optimizer=False)  # outside the wrapper: not counted in global_step
        self._update(optimizers[1], loss)
        return loss

    def _update(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.configure_gradient_clipping(optimizer)
        optimizer.step()

    def _log_metrics(self, prefix: str) -> None:
        for name, metrics in (("psnr", self.psnr), ("ssim", self.ssim)):
            values = {level: metric.compute() for level, metric in metrics.items() if metric.update_called}
            for level, value in values.items():
                self.log(f"{prefix}/{name}/{level}", value, sync_dist=False)
            if values:
                self.log(f"{prefix}/{name}", torch.stack(list(values.values())).mean(), prog_bar=True)
            for metric in metrics.values():
                metric.reset()
        usage = self.usage.compute()
        self.log("tokenizer/usage", usage.share, prog_bar=True)
        self.log("tokenizer/perplexity", usage.perplexity)
        for scale, (share, perplexity) in enumerate(zip(usage.share_S, usage.perplexity_S), start=1):
            self.log(f"tokenizer/usage/scale_{scale:02d}", share)
            self.log(f"tokenizer/perplexity/scale_{scale:02d}", perplexity)
        self.usage.reset()


def load_tokenizer(checkpoint_path: str | Path, key: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a `TokenizerModule` checkpoint, frozen and in evaluation mode.

    Args:
        checkpoint_path: a checkpoint that Lightning saved, on any stage.
        key: the configuration key to name in errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint of a `TokenizerModule`.
    """
    if not Path(checkpoint_path).is_file():
        raise FileNotFoundError(f"{key}: {checkpoint_path} does not exist; give the checkpoint of a TokenizerModule")
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    if "tokenizer_config" not in checkpoint:
        raise ValueError(f"{key}: {checkpoint_path} is not the checkpoint of a TokenizerModule")
    tokenizer = Tokenizer(TokenizerConfig.from_dict(checkpoint["tokenizer_config"]))
    prefix = "tokenizer."
    state = {name[len(prefix) :]: value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)}
    tokenizer.load_state_dict(state)
    return tokenizer.requires_grad_(False).eval()


# Hyper-parameters given as objects are pickled as these classes; safe loading lets in nothing else but tensors and plain types.
torch.serialization.add_safe_globals(
    [TokenizerConfig, SemanticConfig, PixelConfig, ScaleSchedule, LossWeights, DiscriminatorConfig, Correction]
)


def to_signed(images_BCHW: Tensor) -> Tensor:
    """uint8 images -> floats in [-1, 1]."""
    return images_BCHW.float() / 127.5 - 1.0


def _stage_config(config: TokenizerConfig, stage: str, semantic_encoder: str | None) -> TokenizerConfig:
    if stage == "pixel":
        return replace(config, semantic=None)
    if config.semantic is not None and semantic_encoder is not None:
        return replace(config, semantic=read_semantic_config(semantic_encoder, config.semantic, config.schedule.stride))
    return config


def _start_same(tokenizer: Tokenizer, source: Tokenizer) -> None:
    tokenizer.load_state_dict(copy.deepcopy(source.state_dict()))
