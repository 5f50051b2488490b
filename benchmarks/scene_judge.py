"""Draws pictures of composed scenes with a checkpoint, and measures them: for GRPO's table and for ablations.

reward      what GRPO is trained on, and each of its parts: the picture is read back exactly (`rewards/scene.py`)
distance    mean squared difference of pixels (64 x 64) between a picture and the scene that it should show
nearer      the share of the split's other scenes that the picture is nearer to than to its own: 0.5 by chance, 0 at best
rank_1, 5   the share of pictures whose scene is the nearest of all of the split, or among the five nearest
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn import functional as F

from nextflow.datamodules.prompts import PromptDataModule
from nextflow.evaluation.pictures import Cell, draw_sheet
from nextflow.evaluation.retrieval import squared_distances
from nextflow.generation.engine import generate
from nextflow.generation.requests import GenerationRequest
from nextflow.lightning_modules.tokenizer import load_tokenizer
from nextflow.lightning_modules.transformer_checkpoint import load_transformer
from nextflow.rewards.mixture import RewardMixture
from nextflow.rewards.scene import SceneReward
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.scales import ScaleSchedule


class SceneJudge:
    """Pictures of the same scenes with the same seeds for every checkpoint, at temperature 1 without guidance."""

    def __init__(
        self,
        *,
        shards: Mapping[str, str],
        tokenizer: str,
        text_tokenizer: str,
        schedule: Mapping[str, Any],
        level: int,
        prompts: int,
        samples: int,
        rewards: Mapping[str, Any] | None = None,
        reward_weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            shards: the name of a split -> its shards of scenes.
            tokenizer: checkpoint of the image tokenizer.
            text_tokenizer: folder of the text tokenizer.
            schedule: arguments of the ScaleSchedule.
            level: resolution of the pictures.
            prompts: scenes of each split.
            samples: pictures of each scene.
            rewards: name -> a SceneReward as configs write it; none if not given.
            reward_weights: name -> weight.
        """
        self.level, self.samples = level, samples
        self.splits = {
            name: [
                prompt
                for batch in PromptDataModule(
                    shards={name: path, "train": path}, splits=[name], per_split=prompts, train_split=name, seed=0,
                    task="image", level=level, schedule=ScaleSchedule(**schedule), text_tokenizer=text_tokenizer,
                ).predict_dataloader()
                for prompt in batch.prompts
            ]
            for name, path in shards.items()
        }  # fmt: skip
        self.tokenizer = load_tokenizer(tokenizer)
        chosen = {name: SceneReward(**reward["init_args"]) for name, reward in (rewards or {}).items()}
        self.rewards = RewardMixture(chosen, reward_weights) if chosen else None

    def __call__(self, checkpoint: str | Path, sheet: Path) -> dict[str, float]:
        """SPLIT/MEASURE -> value; some of the pictures go to the image file `sheet`."""
        loaded = load_transformer(checkpoint)
        values, rows = {}, []
        for split, prompts in self.splits.items():
            chosen = [prompt for prompt in prompts for _ in range(self.samples)]
            requests = [
                GenerationRequest(
                    segments=tuple(segment for segment in prompt.segments if isinstance(segment, TextSegment)),
                    grids=loaded.schedule.grids(self.level, prompt.aspect_ratio),
                    seed=number,
                )
                for number, prompt in enumerate(chosen)
            ]
            with torch.autocast("cpu", torch.bfloat16):
                results = generate(loaded.transformer, requests, layout=loaded.layout, tokenizer=self.tokenizer)
            pictures = [result.image.permute(2, 0, 1).contiguous() for result in results if result.image is not None]
            if self.rewards is not None:
                facts = [prompt.metadata for prompt in chosen]
                scores = self.rewards(pictures, [prompt.text for prompt in chosen], facts)
                values[f"{split}/reward"] = float(scores.total_N.nanmean())
                values |= {f"{split}/{name}": float(score_N.nanmean()) for name, score_N in scores.by_name.items()}
            gallery = np.stack([_pixels(prompt.reference) for prompt in prompts])
            answers = np.arange(len(chosen)) // self.samples
            measured = compare(np.stack([_pixels(picture) for picture in pictures]), gallery, answers)
            values |= {f"{split}/{name}": value for name, value in measured.items()}
            cells = [Cell(_pixels(picture), prompt.text) for picture, prompt in zip(pictures, chosen)]
            rows += [cells[start : start + 8] for start in range(0, min(24, len(cells)), 8)]
        draw_sheet(rows, side=96).save(sheet)
        return values


def compare(pictures: np.ndarray, gallery: np.ndarray, answers: Sequence[int] | np.ndarray) -> dict[str, float]:
    """What needs pixels alone: `pictures` uint8 [P, H, W, 3], `gallery` of G scenes, and which of them each should show."""
    distance_PG = squared_distances(pictures, gallery)
    right = distance_PG[np.arange(len(pictures)), answers]
    others = (distance_PG < right[:, None]).sum(axis=1)
    return {
        **{f"rank_{place}": float((others < place).mean()) for place in (1, 5)},
        "nearer": float(others.mean() / max(1, len(gallery) - 1)),
        "distance": float(right.mean()),
    }


def merged(paths: Sequence[str | Path]) -> dict:
    """Several configs as one, as the command line merges them: mappings are joined, all else is replaced."""

    def joined(old: dict, new: dict) -> dict:
        both = {
            key: joined(old[key], new[key])
            for key in new
            if isinstance(old.get(key), dict) and isinstance(new[key], dict)
        }
        return {**old, **new, **both}

    return reduce(joined, (yaml.safe_load(Path(path).read_text()) for path in paths))


def _pixels(picture_3HW: torch.Tensor) -> np.ndarray:
    """uint8 [64, 64, 3]: scenes of all shapes are compared as squares."""
    square_13HW = F.interpolate(picture_3HW[None].float(), size=(64, 64), mode="bilinear", antialias=True)
    return square_13HW[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
