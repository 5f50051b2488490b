"""Trains the image tokenizer in three stages (NextFlow section 3.1) and turns images into codes.

    pixel      the pixel branch alone
    joint      everything; pixel encoder, decoder and codebook from the pixel stage, semantic encoder from a SigLIP 2 folder
    decoder    the pixel decoder alone, doubled (`tokenizer.decoder_capacity: 2`), everything else frozen, from the joint stage

Steps: `trainer.global_step` counts optimiser steps, and Lightning would count the discriminator's too, so that
`max_steps` would end a run after half the batches. Here only the generator's steps are counted (the discriminator's
optimiser is stepped outside of Lightning's wrapper): `global_step`, `max_steps` and all schedules count batches, with
and without a discriminator. `trainer.accumulate_grad_batches` (refused with a discriminator) makes one step of several
batches.

Frozen parts are frozen in every way: no gradient, evaluation mode whatever `train()` says, and no place in an optimiser.
Teacher and perceptual network are not even submodules (`Objective`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from nextflow.evaluation.inception import load_inception
from nextflow.evaluation.reconstruction import ReconstructionEvaluation, ReconstructionMetrics, evaluate
from nextflow.lightning_modules.code_batch import CodeBatch
from nextflow.lightning_modules.initial_file import BeginsFromFile
from nextflow.lightning_modules.optim import default_adam, warmup_cosine
from nextflow.lightning_modules.sharding import clip_gradients, from_rank_0, keep_whole, optimizer_groups
from nextflow.lightning_modules.tokenizer_checkpoint import load_tokenizer
from nextflow.models.tokenizer.adaptive_weight import AdaptiveWeight
from nextflow.models.tokenizer.config import TokenizerConfig
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from nextflow.models.tokenizer.losses import (
    LossWeights,
    Objective,
    PerceptualLoss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.tokenizer.semantic import read_tower
from nextflow.models.tokenizer.stages import Stage, check_resumed, frozen_parts, stage_config, start_stage
from nextflow.models.tokenizer.usage import CodebookUsage
from nextflow.sequence.correction import CorrectedCodes, Correction


class TokenizerModule(BeginsFromFile):
    """One training stage of the tokenizer; predicting yields codes.

    Callbacks may set `scale_keep`: for each scale whether the training step uses it (scale dropout), or None for all;
    and `shard`: `callable(module, whole=parameters)`, applied once to the tokenizer (FSDP2).

    Args:
        tokenizer: architecture. The semantic branch is left out in the pixel stage and takes its tower's sizes from
            `semantic_encoder`, where that folder exists.
        stage: `pixel`, `joint` or `decoder`.
        init_from: checkpoint of the stage before (required by `decoder`; `joint` may start from nothing).
        semantic_encoder: folder of a Hugging Face Siglip2Model; required by `joint` while `losses.semantic` is above 0.
        semantic_encoder_trainable: whether `joint` trains the tower of that folder; its projection trains either way. A
            frozen tower is its own teacher.
        losses: weight of each loss term.
        perceptual_weights: file with torchvision's VGG16 weights, required while `losses.perceptual` is above 0.
        discriminator: size of the patch discriminator, built while `losses.adversarial` is above 0.
        discriminator_start: step from which discriminator and adversarial loss run.
        generator_optimizer: optimiser of everything but the discriminator.
        discriminator_optimizer: optimiser of the discriminator.
        warmup_steps: batches over which the learning rate rises; after them it falls to 0 as a cosine.
        total_steps: batches of the whole schedule; null takes them from the trainer (`max_steps`, or epochs times
            batches).
        gradient_clip: largest gradient norm of generator and discriminator each; set this, not
            `trainer.gradient_clip_val`.
        correction: self-correction of predicted codes (token shards then hold the corrected ones too); null is off.
        evaluation: what `test` measures.
    """

    def __init__(
        self,
        tokenizer: TokenizerConfig,
        stage: Stage = "joint",
        init_from: str | None = None,
        semantic_encoder: str | None = None,
        semantic_encoder_trainable: bool = True,
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
        evaluation: ReconstructionEvaluation = ReconstructionEvaluation(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.losses = losses.for_stage(stage)
        if tokenizer.semantic is None:
            self.losses = replace(self.losses, semantic=0.0)
        if self.losses.semantic and semantic_encoder is None:
            raise ValueError("stage joint needs `semantic_encoder`, the folder of a Siglip2Model, or losses.semantic 0")
        if self.losses.perceptual and perceptual_weights is None:
            raise ValueError(
                "losses.perceptual needs `perceptual_weights`, the file vgg16-397923af.pth of torchvision; 0 turns it off"
            )
        self.save_hyperparameters(ignore=["generator_optimizer", "discriminator_optimizer"])
        self.stage, self.init_from = stage, init_from
        self.semantic_encoder, self.semantic_encoder_trainable = semantic_encoder, semantic_encoder_trainable
        self.perceptual_weights, self.discriminator_start = perceptual_weights, discriminator_start
        self.generator_optimizer, self.discriminator_optimizer = generator_optimizer, discriminator_optimizer
        self.warmup_steps, self.total_steps, self.gradient_clip = warmup_steps, total_steps, gradient_clip
        self.correction = correction
        self.scale_keep: tuple[bool, ...] | None = None
        self.shard: Any = None
        self._spread = False

        config = stage_config(tokenizer, stage, semantic_encoder)
        self.tokenizer = Tokenizer(config)
        self.discriminator: Any = PatchDiscriminator(discriminator) if losses.adversarial else None
        self.objective = Objective(self.losses)
        for part in self.frozen_parts():
            part.requires_grad_(False)

        self.evaluation = evaluation
        usage = CodebookUsage(max(tokenizer.schedule.levels.values()), tokenizer.codebook_size)
        self.metrics = ReconstructionMetrics(usage, tokenizer.codebook_size)

    def setup(self, stage: str) -> None:
        """Start from the stage before."""
        wanted = self.evaluation if stage == "test" else ReconstructionEvaluation()
        lpips_weights, key = wanted.lpips_weights, "model.evaluation.lpips_weights"
        self.metrics.lpips = None if lpips_weights is None else PerceptualLoss(lpips_weights, key)
        self.metrics.inception = load_inception(wanted.inception_weights) if wanted.rfid else None
        if stage != "fit":
            return
        self._check_trainer()
        self.automatic_optimization = self.discriminator is None
        perceptual = PerceptualLoss(str(self.perceptual_weights)) if self.losses.perceptual else None
        has_teacher = self.losses.semantic and self.semantic_encoder_trainable
        teacher = read_tower(str(self.semantic_encoder), self.tokenizer.config) if has_teacher else None
        self.objective = Objective(self.losses, perceptual, teacher)
        with self.may_be_gone():
            source = None if self.init_from is None else load_tokenizer(self.init_from, key="init_from")
            start_stage(self.tokenizer, self.stage, source, self.semantic_encoder)

    def configure_model(self) -> None:
        """Spreads the module over processes: what FSDP2 shards, and what stays whole under FSDP2 or DDP. Idempotent."""
        if self._spread or self._trainer is None:
            return
        self._spread, whole = True, [] if self.discriminator is None else ["discriminator"]
        if self.shard is not None:
            self.shard(self.tokenizer, whole=self.tokenizer.quantizer.parameters())
            whole.append("tokenizer.quantizer")
        keep_whole(self, whole)

    def on_fit_start(self) -> None:
        self.train()  # Lightning leaves modes as they are; without this, frozen parts would still be as they were built
        self.objective.to(self.device)
        from_rank_0(self)

    def train(self, mode: bool = True) -> TokenizerModule:
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        return self

    def frozen_parts(self) -> list[torch.nn.Module]:
        """The parts of the tokenizer that this run does not train."""
        return frozen_parts(
            self.tokenizer,
            self.stage,
            encoder_trains=self.semantic_encoder_trainable,
            semantic_loss=self.losses.semantic > 0,
        )

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.tokenizer.parameters() if parameter.requires_grad]
        optimizers = [self.generator_optimizer(optimizer_groups(trained))]
        if self.discriminator is not None:
            optimizers.append(self.discriminator_optimizer(self.discriminator.parameters()))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["initial_lr"] = group["lr"]  # now: a distributed checkpoint restores what it finds, nothing more
        return optimizers

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        # not through Lightning, which refuses fused optimisers: they matter on the CPU
        clip_gradients((p for group in optimizer.param_groups for p in group["params"]), self.gradient_clip)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The learning rate is a pure function of the batches seen."""
        total = self.total_steps or self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the learning-rate schedule has no end: set trainer.max_steps or model.total_steps")
        factor = warmup_cosine(self.global_step, warmup_steps=self.warmup_steps, total_steps=int(total))
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        images_BCHW, losses = to_signed(batch.images), self.losses
        with AdaptiveWeight(self.tokenizer.pixel_decoder) as adaptive_weight:
            output = self.tokenizer(
                images_BCHW,
                batch.grids,
                self.scale_keep,
                entropy=losses.entropy > 0,
                decode_semantic=losses.semantic > 0,
            )
        terms = self.objective.terms(images_BCHW, output)
        loss = self.objective.total(terms)
        adversarial = self.discriminator is not None and self.global_step >= self.discriminator_start
        if adversarial:
            self.discriminator.requires_grad_(False)
            terms["adversarial"] = hinge_generator_loss(self.discriminator(output.images_BCHW))
            loss = loss + self._adversarial_weight(terms, output.images_BCHW, adaptive_weight) * terms["adversarial"]
        if self.discriminator is not None:
            optimizers: Any = self.optimizers()
            self._update(optimizers[0], partial(self.manual_backward, loss))
            if adversarial:
                terms["discriminator"] = self._discriminator_step(images_BCHW, output.images_BCHW.detach())
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images_BCHW))
        self.log_dict(
            {f"train/loss_{name}": term.detach() for name, term in terms.items()}, batch_size=len(images_BCHW)
        )
        return loss if self.automatic_optimization else None

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        evaluate(self.tokenizer, batch, self.metrics)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_start(self) -> None:
        super().on_test_start()
        self._check_trained()

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Returns `Reconstructions`, for callbacks."""
        return evaluate(self.tokenizer, batch, self.metrics, self.evaluation.per_scale)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> CodeBatch:
        """Codes of a batch of images. Raises ValueError for a tokenizer that was never trained."""
        self._check_trained()
        features_BChw = self.tokenizer.features(to_signed(batch.images), batch.grids)
        encoding = self.tokenizer.quantizer.encode(features_BChw, batch.grids)
        corrected = None
        if self.correction is not None:
            names = [f"{batch.level}/{key}/{name}" for key, name in zip(batch.keys, batch.names)]
            seed_B = self.correction.seeds(names, self.device)
            drawn = self.tokenizer.quantizer.encode(features_BChw, batch.grids, self.correction, seed_B)
            corrected = CorrectedCodes(drawn.input_codes_BN.cpu(), drawn.target_codes_BN.cpu())
        return CodeBatch(
            keys=batch.keys,
            names=batch.names,
            records=batch.records,
            codes_BN=encoding.target_codes_BN.cpu(),
            corrected=corrected,
            grids=batch.grids,
            level=batch.level,
            aspect_ratio=batch.aspect_ratio,
            split=batch.split,
            valid_size=getattr(batch, "valid_size", None),
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What this config does without (a discriminator, outside of fit) may be in the file; the tokenizer must fit."""
        super().on_load_checkpoint(checkpoint)
        if "tokenizer_config" in checkpoint:
            check_resumed(self.tokenizer.config, checkpoint["tokenizer_config"])
        ours, stored = self.state_dict(), checkpoint.get("state_dict", {})  # FSDP2's strategy has already taken it out
        checkpoint["state_dict"] = {k: v for k, v in stored.items() if k.startswith("tokenizer.") or k in ours}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokenizer_config"] = self.tokenizer.config.to_dict()

    def _check_trained(self) -> None:
        if not bool(self.tokenizer.quantizer.health.pixel_ready):
            raise ValueError("this tokenizer has no trained weights: give --ckpt_path")

    def _check_trainer(self) -> None:
        """Refuses options that Lightning would ignore here, or refuse without naming what to set instead."""
        if self.trainer.gradient_clip_val is not None:
            raise ValueError("trainer.gradient_clip_val does not reach the tokenizer: set model.gradient_clip instead")
        if self.discriminator is None:
            return
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches must be 1 with a discriminator (losses.adversarial above 0): "
                "raise data.batch_size or the number of devices instead"
            )
        if str(self.trainer.precision).startswith("16"):
            raise ValueError(
                "trainer.precision 16 needs a gradient scaler, which a run with a discriminator bypasses; use bf16-mixed"
            )

    def _adversarial_weight(
        self, terms: dict[str, Tensor], reconstruction_BCHW: Tensor, adaptive_weight: AdaptiveWeight
    ) -> Tensor | float:
        if not self.losses.adaptive_adversarial:
            return self.losses.adversarial
        pixels = self.objective.total(terms, pixels_only=True)
        weight = self.losses.adversarial * adaptive_weight(pixels, terms["adversarial"], reconstruction_BCHW)
        self.log("train/adversarial_weight", weight, batch_size=len(reconstruction_BCHW))
        return weight

    def _discriminator_step(self, images_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
        self.discriminator.requires_grad_(True)
        loss = hinge_discriminator_loss(self.discriminator(images_BCHW), self.discriminator(reconstruction_BCHW))
        optimizers: Any = self.optimizers(use_pl_optimizer=False)  # outside the wrapper: not counted in global_step
        # not `manual_backward`, after which DDP would wait for gradients of the tokenizer
        self._update(optimizers[1], loss.backward)
        return loss

    def _update(self, optimizer: Any, backward: Callable[[], None]) -> None:
        optimizer.zero_grad()
        backward()
        self.configure_gradient_clipping(optimizer)
        optimizer.step()

    def _log_metrics(self, prefix: str) -> None:
        for name, value in self.metrics.compute(self.device).logged(prefix).items():
            # equal on all ranks already; Lightning would warn of each that is not averaged
            self.log(name, value, prog_bar=name in (f"{prefix}/psnr", "tokenizer/usage"), sync_dist=True)
        self.metrics.reset()


def to_signed(images_BCHW: Tensor) -> Tensor:
    """uint8 images -> floats in [-1, 1]."""
    return images_BCHW.float() / 127.5 - 1.0
