"""How well picture and prompt agree, by a model that was trained to tell: CLIP, SigLIP, SigLIP 2, PickScore or our own.

Every one of them is a folder that transformers reads. What `ContrastiveModule` writes is a SigLIP 2 folder without processor:
name its text tokenizer's folder too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow.rewards.reward import Reward


class ContrastiveReward(Reward):
    """Cosine of the features of picture and prompt."""

    def __init__(
        self,
        model: str,
        text_tokenizer: str | None = None,
        batch_size: int = 64,
        scaled: bool = False,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            model: folder of a model with image and text features; loaded at first use.
            text_tokenizer: folder of the text tokenizer that a ContrastiveModule was trained with; null for a published model,
                whose folder holds a processor.
            batch_size: pictures that are scored together.
            scaled: times the model's logit scale, as PickScore is usually given.
            device: where the model runs.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        for key, folder in (("model", model), ("text_tokenizer", text_tokenizer)):
            if folder is not None and not Path(folder).is_dir():
                raise FileNotFoundError(f"ContrastiveReward.{key}: there is no folder {folder}")
        self.folder, self.text_tokenizer = model, text_tokenizer
        self.batch_size, self.scaled, self.device = batch_size, scaled, device
        self._model: Any = None
        self._processor: Any = None
        self._tokenizer: Any = None

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """float32 [N], -1 to 1 where it is not scaled; NaN where the prompt has no text."""
        self._load()
        score_N = torch.full((len(images),), float("nan"))
        groups: dict[torch.Size, list[int]] = {}
        for index, (image, prompt) in enumerate(zip(images, prompts)):
            if prompt.strip():
                groups.setdefault(image.shape, []).append(index)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            for members in groups.values():
                for start in range(0, len(members), self.batch_size):
                    chosen = members[start : start + self.batch_size]
                    score_N[chosen] = self._cosine([images[i] for i in chosen], [prompts[i] for i in chosen])
        return score_N * self._model.logit_scale.exp().item() if self.scaled else score_N

    def _cosine(self, images: list[Tensor], prompts: list[str]) -> Tensor:
        if self._tokenizer is None:
            given = self._processor(
                images=images, text=prompts, padding="max_length", truncation=True, return_tensors="pt"
            ).to(self.device)
            text_names = ("input_ids", "attention_mask")
            text = self._model.get_text_features(**{name: given[name] for name in text_names if name in given})
            image = self._model.get_image_features(
                **{name: value for name, value in given.items() if name not in text_names}
            )
        else:
            text = self._model.get_text_features(input_ids=self._ids(prompts))
            image = self._model.get_image_features(**self._patches(torch.stack(images)))
        return F.cosine_similarity(_features(image), _features(text)).cpu()

    def _ids(self, prompts: list[str]) -> Tensor:
        """[N, T] ids, cut at or padded to the text tower's length with the end-of-document id, as in training."""
        length = self._model.config.text_config.max_position_embeddings
        ids_NT = torch.full((len(prompts), length), self._tokenizer.eos_token_id)
        for row, prompt in enumerate(prompts):
            ids = self._tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True)[:length]
            ids_NT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return ids_NT.to(self.device)

    def _patches(self, image_NCHW: Tensor) -> dict[str, Tensor]:
        """What a SigLIP 2 vision tower reads: pictures of one size in [-1, 1], cut into its patches."""
        side = self._model.config.vision_config.patch_size
        num, channels, height, width = image_NCHW.shape
        if height % side or width % side:
            raise ValueError(
                f"ContrastiveReward.model has patches of {side} pixels; a picture has {height} x {width} pixels"
            )
        grid = (height // side, width // side)
        x = image_NCHW.to(self.device).float() / 127.5 - 1
        x = x.view(num, channels, grid[0], side, grid[1], side).permute(0, 2, 4, 3, 5, 1)
        return {
            "pixel_values": x.reshape(num, grid[0] * grid[1], side * side * channels),
            "pixel_attention_mask": torch.ones(num, grid[0] * grid[1], dtype=torch.int64, device=self.device),
            "spatial_shapes": torch.tensor([grid] * num, device=self.device),
        }

    def _load(self) -> None:
        # Here and not in the constructor: a config that names a reward is read without reading its weights.
        if self._model is not None:
            return
        from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

        self._model = AutoModel.from_pretrained(self.folder, local_files_only=True).eval().to(self.device)
        if self.text_tokenizer is None:
            self._processor = AutoProcessor.from_pretrained(self.folder, local_files_only=True)
        else:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(self.text_tokenizer, local_files_only=True)


def _features(output: Any) -> Tensor:
    """The feature vectors: transformers returns them bare, or as the pooled part of a larger output."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()
