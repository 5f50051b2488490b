"""Pretraining, continued training, SFT and alignment of the transformer: one module, told apart by configs (paper section 3.2).

    loss = sum over targets of weight * cross-entropy / number of targets

summed over ranks and over the batches of one optimiser step, so neither data parallelism nor accumulation changes it.
Images that come as pixels are encoded by the frozen tokenizer, in float32 whatever the precision, so that codes
made on the fly are those of token shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from nextflow.generation.requests import Generated, GenerationRequest
from nextflow.generation.sampling import SamplingConfig
from nextflow.kernels.attention import Implementation
from nextflow.kernels.linear_cross_entropy import LinearCrossEntropy
from nextflow.lightning_modules.agreement import check_checkpoint, check_data, check_levels, describe
from nextflow.lightning_modules.answering import generated_of, request_of
from nextflow.lightning_modules.checkpoint_state import check_average, number_optimizer_states
from nextflow.lightning_modules.encoding import count_corrected, encode_pixels, rows_with_codes
from nextflow.lightning_modules.initial_file import BeginsFromFile
from nextflow.lightning_modules.optim import freeze_for_alignment, parameter_groups, warmup_cosine
from nextflow.lightning_modules.sharding import clip_gradients, gradient_norm
from nextflow.lightning_modules.token_metrics import TokenMetrics
from nextflow.lightning_modules.tokenizer import load_tokenizer
from nextflow.lightning_modules.transformer_building import build_average, build_transformer
from nextflow.lightning_modules.transformer_checkpoint import CHECKPOINT_KEY, Weights, initialize
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.models.transformer.config import DecoderConfig, TransformerConfig
from nextflow.models.transformer.model import Transformer
from nextflow.sequence.correction import Correction
from nextflow.sequence.image_layout import LayoutConfig
from nextflow.sequence.layout import PackedRows
from nextflow.sequence.scales import Grid
from nextflow.sequence.text_tokenizer import load_text_tokenizer


class PretrainingModule(BeginsFromFile):
    """Trains the transformer on packed batches and, for `predict`, answers prompts.

    Attributes that callbacks may set:
        total_steps: optimiser steps of the learning-rate schedule, when the config leaves it open.
        shard: `callable(transformer, cast_inputs=False)`, applied once when the layers exist.
        keeps_ema: whether to keep an average of `averaged` as `ema`.
        correction: self-correction of the images that the next training step learns from; None is off.
    """

    tokenizer: Tokenizer
    averaged = "transformer"
    objects: tuple[str, ...] = ("optimizer",)
    """Arguments that are no hyper-parameters, as they are objects: a checkpoint does not hold them."""

    def __init__(
        self,
        *,
        transformer: DecoderConfig,
        tokenizer: str,
        text_tokenizer: str,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        final_learning_rate: float = 0.0,
        trainable: Literal["all", "alignment"] = "all",
        initialize_from: str | None = None,
        initialize_weights: Weights = "trained",
        attention: Implementation = "auto",
        layout: LayoutConfig = LayoutConfig(),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        guidance: float = 0.0,
        max_text_tokens: int = 64,
        max_images: int = 5,
    ) -> None:
        """
        Args:
            transformer: the decoder's shape; vocabulary sizes come from the two tokenizers.
            tokenizer: checkpoint of a TokenizerModule. It stays frozen; our checkpoints hold its fingerprint alone.
            text_tokenizer: folder of a Hugging Face tokenizer.
            optimizer: called with the parameter groups; norms, biases and embeddings have no weight decay.
            warmup_steps: optimiser steps of linear warm-up.
            total_steps: optimiser steps until the cosine ends; null takes what the trainer will run.
            final_learning_rate: fraction of the learning rate at the end; 1 is constant after the warm-up.
            trainable: "all", or "alignment": only the connector, the embeddings of new ids and the output head.
            initialize_from: checkpoint of an earlier stage, or folder of Qwen2.5-VL safetensors; weights alone.
            initialize_weights: which weights of that checkpoint: "trained", or "ema", their average (callback EMA).
            attention: kernel of packed batches: "auto", "sdpa", "dense", "spans", "flex" or "flash".
            layout: as in the data; used by `predict`.
            sampling: how `predict` draws.
            guidance: strength of guidance at the last scale in `predict`; 0 is off.
            max_text_tokens: longest text that `predict` writes.
            max_images: most pictures of an interleaved answer of `predict`.
        """
        super().__init__()
        self.save_hyperparameters(ignore=list(self.objects))
        self.optimizer_factory = optimizer
        self.layout, self.sampling, self.guidance = layout, sampling, guidance
        self.max_text_tokens, self.max_images = max_text_tokens, max_images
        self.warmup_steps, self.final_learning_rate = warmup_steps, final_learning_rate
        self.trainable, self.attention = trainable, attention
        self.initialize_from, self.initialize_weights = initialize_from, initialize_weights
        self.tokenizer_path, self.text_tokenizer_path = tokenizer, text_tokenizer
        self.total_steps = total_steps
        self.correction: Correction | None = None
        self._seed = int(torch.randint(2**62, ()))  # here: some strategies seed torch anew before the layers are built
        self.shard: Any = None
        self.keeps_ema = False
        self.trained_levels: set[int] = set()
        self.transformer: Any = None  # a Transformer, once configure_model has run
        self.ema: Any = None  # another, if keeps_ema
        frozen = load_tokenizer(tokenizer)
        # Not a submodule: neither trained, nor sharded, nor saved, nor switched by train().
        object.__setattr__(self, "tokenizer", frozen)
        self.text_tokenizer = load_text_tokenizer(text_tokenizer)
        self.schedule = frozen.schedule
        self._fingerprint = frozen.fingerprint()
        self.config = TransformerConfig.resolve(
            transformer,
            text_size=self.text_tokenizer.size,
            start_id=self.text_tokenizer.start_id,
            end_id=self.text_tokenizer.end_id,
            codebook_size=frozen.config.codebook_size,
            code_dim=frozen.code_dim,
        )
        if max(self.schedule.levels.values()) > self.config.max_scales:
            raise ValueError(
                f"transformer.max_scales is {self.config.max_scales}; "
                f"the tokenizer's schedule has {max(self.schedule.levels.values())} scales"
            )
        self._targets: list[Tensor] = []
        self._totals: TokenMetrics | None = None

    def configure_model(self) -> None:
        """Build the transformer, with the tokenizer's codebook as code embedding. Idempotent."""
        if self.transformer is not None:
            return
        self.transformer = self.build(from_start=False)
        if self._trainer is not None:
            with self.may_be_gone():
                self._start(self.transformer)
        self.ema = build_average(self.transformer, self._prepare, self.shard) if self.keeps_ema else None

    def build(self, *, from_start: bool) -> Transformer:
        """A transformer with the tokenizer's codebook, sharded if the run is, and `from_start` with what it begins with."""
        strategy = None if self._trainer is None else self.trainer.strategy
        model = build_transformer(self.config, self._seed, self._prepare, self.shard, strategy)
        model.initialize_codes(self.tokenizer.quantizer.entries_KC())
        if from_start:
            self._start(model)
        return model

    def _start(self, model: Transformer) -> None:
        if self.initialize_from is not None:
            levels = initialize(model, self.initialize_from, self._fingerprint, self.initialize_weights)
            self.trained_levels.update(levels)

    def _prepare(self, model: Transformer) -> None:
        model.set_attention(self.attention)
        if self.trainable == "alignment":
            freeze_for_alignment(model)

    def setup(self, stage: str) -> None:
        """Refuse data that was laid out for another vocabulary, schedule, layout or shape; alpha is the data's own."""
        check_data(self, getattr(self.trainer, "datamodule", None))

    def on_predict_start(self) -> None:
        """The tokenizer is no submodule, so Lightning does not move it."""
        super().on_predict_start()
        self.tokenizer.to(self.device)

    # Training

    def training_step(self, batch, batch_idx: int) -> Tensor:
        """Weighted cross-entropy of a PackedBatch, divided by the global number of targets."""
        rows = self._with_codes(batch)
        if len(rows.code_N):
            self.trained_levels.add(batch.level)
        tokens = self._tokens(rows)
        count = self._sum_over_ranks(rows.num_targets.float()).clamp(min=1)
        self._targets.append(count)
        loss = tokens.total * self.trainer.world_size / self._targets[0]
        if self._logs_now:
            self._log_training(rows, tokens)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Exact accumulation: Lightning averaged batches that were each divided by the first one's targets."""
        batches, self._targets = self._targets, []
        accumulate = self.trainer.accumulate_grad_batches
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if accumulate > 1:
            torch._foreach_mul_(gradients, accumulate * batches[0] / torch.stack(batches).sum())
        if self._logs_now:
            self.log("train/gradient_norm", gradient_norm(self.transformer.parameters()))

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Lightning refuses to clip with fused optimisers under mixed precision, for float16's gradient scaler alone."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm") and self.trainer.precision != "16-mixed":
            clip_gradients(self.transformer.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch, batch_idx: int) -> None:
        """Adds to the sums of the whole set, which are logged under val/ at its end."""
        rows = self._with_codes(batch)
        if self._totals is None:
            self._totals = TokenMetrics(self.config.max_scales, self.device)
        self._totals.add(rows, self._tokens(rows))

    def test_step(self, batch, batch_idx: int) -> None:
        """The same under test/."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log val/."""
        self._log_totals("val")

    def on_test_epoch_end(self) -> None:
        """Log test/."""
        self._log_totals("test")

    def configure_optimizers(self) -> Any:
        """The optimiser with warm-up and cosine decay."""
        total = self.total_steps or self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                "the length of the run is open: set model.total_steps or trainer.max_steps for the learning rate"
            )
        optimizer = self.optimizer_factory(parameter_groups(self.transformer))

        def factor(step: int) -> float:
            return warmup_cosine(
                step,
                warmup_steps=self.warmup_steps,
                total_steps=int(total),
                final=self.final_learning_rate,
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Generation

    def predict_step(self, batch, batch_idx: int) -> list[Generated]:
        """Answer a PromptBatch: an image or a text per prompt, in order."""
        from nextflow.generation.engine import generate

        if self.trainer.state.fn != "fit":  # a run may look at a level before it trains it
            check_levels(self, batch.prompts)
        requests = [self.request(prompt) for prompt in batch.prompts]
        results = generate(
            self.transformer, requests, layout=self.layout, tokenizer=self.tokenizer, sampling=self.sampling
        )
        return [generated_of(prompt, result, self.text_tokenizer) for prompt, result in zip(batch.prompts, results)]

    def request(self, prompt: Any) -> GenerationRequest:
        """What the generation engine is asked for a prompt of a PromptBatch, pictures encoded."""
        return request_of(
            prompt,
            schedule=self.schedule,
            encode=self.encode,
            guidance=self.guidance,
            max_text_tokens=self.max_text_tokens,
            max_images=self.max_images,
        )

    def encode(self, images: Sequence[Tensor], grids: Sequence[tuple[Grid, ...]]) -> list[Tensor]:
        """Codes int64 [N] of uint8 images [3, H, W] of any mix of sizes, by the frozen tokenizer, in their order."""
        return [codes.target_N for codes in encode_pixels(self.tokenizer, images, grids, self.device)]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add everything that was resolved, so that the checkpoint explains itself."""
        checkpoint[CHECKPOINT_KEY] = describe(self, self._fingerprint)
        number_optimizer_states(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other tokenizers or another layout or, to go on training, with or without an average.

        Raises ValueError naming what differs.
        """
        super().on_load_checkpoint(checkpoint)
        check_checkpoint(self, self._fingerprint, checkpoint)
        self.trained_levels.update(checkpoint[CHECKPOINT_KEY].get("levels", ()))
        check_average(self, checkpoint, checkpoint[CHECKPOINT_KEY].get("ema", False))

    # Pieces

    @property
    def _logs_now(self) -> bool:
        trainer: Any = self.trainer
        return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # as Lightning's loggers count

    def _tokens(self, rows: PackedRows) -> LinearCrossEntropy:
        return self.transformer.cross_entropy(self.transformer(rows), rows.target_BL, rows.weight_BL)

    def _with_codes(self, batch) -> PackedRows:
        return rows_with_codes(batch, self.tokenizer, self.config.vocabulary.code_offset, self.correction, self.device)

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op="sum") if self.trainer.world_size > 1 else value

    def _log_training(self, rows: PackedRows, tokens: LinearCrossEntropy) -> None:
        totals = TokenMetrics(self.config.max_scales, self.device)
        totals.add(rows, tokens)
        values = totals.over_ranks(self._sum_over_ranks).named("train")
        if self.correction is not None:
            corrected, trained = self._sum_over_ranks(count_corrected(rows)).tolist()
            values["train/corrected_codes"] = corrected / max(1.0, trained)
        self.log("train/loss", values.pop("train/loss"), prog_bar=True)
        self.log_dict(values)

    def _log_totals(self, prefix: str) -> None:
        # All ranks take part in the sums, also one whose share of the set was empty.
        totals = self._totals or TokenMetrics(self.config.max_scales, self.device)
        values = totals.over_ranks(self._sum_over_ranks).named(prefix)
        self._totals = None
        if f"{prefix}/loss" in values:
            self.log(f"{prefix}/loss", values.pop(f"{prefix}/loss"), prog_bar=True)
        self.log_dict(values)
