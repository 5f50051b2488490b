"""Trains a small SigLIP 2 (image and text towers, sigmoid loss) from scratch or from a folder.

The tokenizer's semantic branch starts from a SigLIP 2 vision tower. Where the published one does not fit (another
stride, a machine without its weights), this module makes one: at the end of `fit` it writes a Hugging Face folder that
`TokenizerModule.semantic_encoder` takes, just as it takes the published folder.

    loss = -1/B * sum_ij log sigmoid(y_ij * (exp(t) * cos(image_i, text_j) + b)),   y = 1 where captions i and j are
    equal, else -1

B images and captions, D width, T text positions, N patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import Siglip2Config, Siglip2Model

from nextflow.lightning_modules.optim import default_adamw, warmup_cosine
from nextflow.lightning_modules.tokenizer import to_signed
from nextflow.models.tokenizer.semantic import naflex_embeddings
from nextflow.sequence.text_tokenizer import load_text_tokenizer


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Sizes of a small SigLIP 2; both towers are equal."""

    width: int = 128
    """Width of both towers and of the shared space."""
    num_layers: int = 4
    """Layers of each tower."""
    num_heads: int = 4
    """Attention heads of each tower."""
    patch_size: int = 8
    """Pixels per patch; the tokenizer's stride must equal it."""
    num_patches: int = 64
    """Entries of the square table of position embeddings, which is resized to each grid."""
    max_text_length: int = 32
    """Text positions; longer captions are cut."""
    initial_bias: float = -10.0
    """Start of the logits' bias. SigLIP's -10 suits its batches of 32,768; at a small batch B about -log(B): far below, only
    the positive pairs have a gradient at first, which pulls all features together and costs a hundred steps or more."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"model.num_heads {self.num_heads} must divide model.width {self.width}")
        if math.isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ValueError(f"model.num_patches {self.num_patches} must be a square number")


class SiglipLogits(nn.Module):
    """A `Siglip2Model` that reads images of one grid and texts of one length, without padding masks."""

    def __init__(self, model: Siglip2Model) -> None:
        super().__init__()
        self.model = model

    def image_features(self, images_BCHW: Tensor) -> Tensor:
        """Normalised [B, D] of images in [-1, 1]."""
        vision = self.model.vision_model
        x_BND = vision.encoder(inputs_embeds=naflex_embeddings(vision.embeddings, images_BCHW)).last_hidden_state
        return F.normalize(vision.head(vision.post_layernorm(x_BND)).float(), dim=-1)

    def text_features(self, ids_BT: Tensor) -> Tensor:
        """Normalised [B, D] of padded texts; like SigLIP, padding is attended to and the last position is the feature."""
        return F.normalize(self.model.text_model(input_ids=ids_BT).pooler_output.float(), dim=-1)

    def forward(self, images_BCHW: Tensor, ids_BT: Tensor) -> Tensor:
        """Logits [image, text]."""
        similarity_BB = self.image_features(images_BCHW) @ self.text_features(ids_BT).T
        return similarity_BB * self.model.logit_scale.float().exp() + self.model.logit_bias.float()


def sigmoid_loss(logits_BB: Tensor, positive_BB: Tensor) -> Tensor:
    """SigLIP's loss; `positive_BB` marks the pairs that belong together."""
    signs_BB = positive_BB.float() * 2 - 1
    return -F.logsigmoid(signs_BB * logits_BB).sum() / len(logits_BB)


class ContrastiveModule(L.LightningModule):
    """Contrastive training on the captions of an `ImageBatch`.

    Under several devices each rank contrasts its own batch.

    Args:
        text_tokenizer: folder of the text tokenizer.
        model: sizes of a model to train from scratch.
        pretrained: folder of a Siglip2Model to start from instead; its vocabulary must be that of `text_tokenizer`.
        output: folder to write the trained model to; null is `siglip2` under the trainer's default_root_dir.
        optimizer: optimiser of all weights.
        warmup_steps: steps over which the learning rate rises; after them it falls to 0 as a cosine.
        total_steps: steps of the whole schedule; null takes them from the trainer.
    """

    def __init__(
        self,
        text_tokenizer: str,
        model: ContrastiveConfig = ContrastiveConfig(),
        pretrained: str | None = None,
        output: str | None = None,
        optimizer: OptimizerCallable = default_adamw,
        warmup_steps: int = 0,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer"])
        self.text_tokenizer = load_text_tokenizer(text_tokenizer)
        self.optimizer, self.warmup_steps, self.total_steps, self.output = optimizer, warmup_steps, total_steps, output
        if pretrained is None:
            siglip = Siglip2Model(_siglip_config(model, self.text_tokenizer.size))
            nn.init.constant_(siglip.logit_scale, math.log(10.0))  # SigLIP's start
            nn.init.constant_(siglip.logit_bias, model.initial_bias)
        else:
            siglip = Siglip2Model.from_pretrained(pretrained, dtype=torch.float32, local_files_only=True)
            vocabulary = siglip.text_model.config.vocab_size
            if vocabulary != self.text_tokenizer.size:
                raise ValueError(f"pretrained has {vocabulary} text ids, text_tokenizer has {self.text_tokenizer.size}")
        self.siglip = SiglipLogits(siglip.train())
        self.image_to_text, self.text_to_image = MeanMetric(), MeanMetric()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        total = self.total_steps or self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("the learning-rate schedule has no end: set trainer.max_steps or model.total_steps")
        factor = warmup_cosine(self.global_step, warmup_steps=self.warmup_steps, total_steps=int(total))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits_BB, positive_BB = self._logits(batch)
        loss = sigmoid_loss(logits_BB, positive_BB)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(logits_BB))
        self.log("train/accuracy", _hits(logits_BB, positive_BB).mean(), batch_size=len(logits_BB))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Retrieval inside a batch: the share of images whose best text is theirs, and of texts whose best image is."""
        logits_BB, positive_BB = self._logits(batch)
        self.image_to_text.update(_hits(logits_BB, positive_BB))
        self.text_to_image.update(_hits(logits_BB.T, positive_BB))

    def on_validation_epoch_end(self) -> None:
        self.log("val/image_to_text", self.image_to_text, prog_bar=True)
        self.log("val/text_to_image", self.text_to_image)

    def on_fit_end(self) -> None:
        """Writes the Hugging Face folder."""
        if self.trainer.is_global_zero:
            folder = Path(self.output or Path(self.trainer.default_root_dir) / "siglip2")
            self.siglip.model.save_pretrained(folder)
            rank_zero_info(f"wrote the SigLIP 2 folder {folder}")

    def text_ids(self, captions: list[str]) -> Tensor:
        """[B, T] ids, cut at or padded to the text tower's length with the end-of-document id."""
        length = self.siglip.model.text_model.config.max_position_embeddings
        ids_BT = torch.full((len(captions), length), self.text_tokenizer.end_id)
        for row, caption in enumerate(captions):
            ids = self.text_tokenizer.encode(caption)[:length]
            ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return ids_BT

    def _logits(self, batch: Any) -> tuple[Tensor, Tensor]:
        number = {caption: index for index, caption in enumerate(batch.captions)}
        numbers_B = torch.tensor([number[caption] for caption in batch.captions], device=self.device)
        logits_BB = self.siglip(to_signed(batch.images), self.text_ids(batch.captions).to(self.device))
        return logits_BB, numbers_B[:, None] == numbers_B


def _hits(logits_BB: Tensor, positive_BB: Tensor) -> Tensor:
    return positive_BB.gather(1, logits_BB.argmax(1, keepdim=True)).float()


def _siglip_config(config: ContrastiveConfig, vocabulary: int) -> Siglip2Config:
    tower = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
    }
    text: dict[str, int | None] = {"vocab_size": vocabulary, "max_position_embeddings": config.max_text_length}
    vision = {"patch_size": config.patch_size, "num_patches": config.num_patches}
    # the ids of special tokens belong to Siglip2's own text tokenizer
    text |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return Siglip2Config(text_config={**tower, **text}, vision_config={**tower, **vision})


torch.serialization.add_safe_globals([ContrastiveConfig])
