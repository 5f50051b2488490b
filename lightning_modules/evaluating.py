"""`test` on a suite of tasks: prompts of several kinds are answered by the generation engine, and judged.

What answers can be something else than the model, to prove the suite itself: the known answers (all right), those of other
prompts (chance), or the known answers as the image tokenizer gives them back, the most that a model of it can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from nextflow.evaluation.judges import CATEGORIES, openmoji_judges
from nextflow.evaluation.suite import Answered, Judged, Part, Score, tally
from nextflow.generation.engine import decode_pixels
from nextflow.generation.sampling import SamplingConfig
from nextflow.kernels.attention import Implementation
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.models.transformer.config import DecoderConfig
from nextflow.rewards.scene_reader import scene_reader
from nextflow.sequence.documents import TextSegment
from nextflow.sequence.image_layout import LayoutConfig

Answers = Literal["model", "truth", "shuffled", "reconstructed"]


class EvaluationModule(PretrainingModule):
    """Answers the PromptBatches of a SuiteDataModule, and scores them at the end.

    Attributes:
        judged: all answers with what was said of them, over all ranks, once `test` is over.
        scores: per category and split.
        details: per part of a category as well, such as the attribute that an edit changes.
    """

    def __init__(
        self,
        *,
        transformer: DecoderConfig,
        tokenizer: str,
        text_tokenizer: str,
        documents: str,
        drawings: str,
        answers: Answers = "model",
        attention: Implementation = "auto",
        layout: LayoutConfig = LayoutConfig(),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(greedy=True),  # noqa: B008 (frozen)
        guidance: float = 0.0,
        max_text_tokens: int = 64,
        max_images: int = 5,
    ) -> None:
        """
        Args:
            transformer: the decoder's shape, that of the checkpoint.
            tokenizer: checkpoint of a TokenizerModule.
            text_tokenizer: folder of a Hugging Face tokenizer.
            documents: folder of the OpenMoji documents (`python -m nextflow.datamodules.openmoji`): its drawings are what
                pictures are compared with.
            drawings: folder of the drawings that scenes are made of (`python -m nextflow.datamodules.openmoji.tiles`).
            answers: what is judged: answers of the "model"; the "truth", which is all right; the truth of other prompts,
                "shuffled", which is right by chance; the truth "reconstructed" by the image tokenizer.
            attention: kernel of packed batches.
            layout: that of the checkpoint.
            sampling: how answers are drawn.
            guidance: of pictures, at the last scale.
            max_text_tokens: longest text.
            max_images: most pictures of a story.
        """
        super().__init__(
            transformer=transformer,
            tokenizer=tokenizer,
            text_tokenizer=text_tokenizer,
            attention=attention,
            layout=layout,
            sampling=sampling,
            guidance=guidance,
            max_text_tokens=max_text_tokens,
            max_images=max_images,
        )
        self.documents, self.drawings, self.answers = documents, drawings, answers
        self.judged: list[Judged] = []
        self.scores: list[Score] = []
        self.details: list[Score] = []
        self._answered: list[Answered] = []

    def on_test_start(self) -> None:
        """The tokenizer is no submodule, so Lightning does not move it.

        Raises:
            ValueError: the model is to answer, and nobody says which.
        """
        if self.answers == "model" and not self.trainer.ckpt_path:
            raise ValueError("name the checkpoint that is to be evaluated, --ckpt_path, or set model.answers to truth")
        self.tokenizer.to(self.device)
        self._answered = []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Answer a PromptBatch. A drawing is also shown as the image tokenizer gives it back."""
        known = [tuple(map(_part, prompt.answer)) for prompt in batch.prompts]
        answers = known
        if self.answers == "model":
            answers = [
                tuple(part if isinstance(part, str) else part.numpy() for part in result.parts)
                for result in self.predict_step(batch, batch_idx)
            ]
        elif self.answers == "reconstructed":
            answers = self._reconstructed(batch.prompts)
        shows_copies = batch.prompts[0].kind == "drawings"  # a batch is of one kind
        copies = self._reconstructed(batch.prompts) if shows_copies and self.answers == "model" else answers
        for prompt, answer, truth, copy in zip(batch.prompts, answers, known, copies):
            answered = Answered(
                kind=prompt.kind,
                index=prompt.index,
                key=prompt.key,
                split=prompt.split,
                given=tuple(map(self._given, prompt.segments)),
                answer=answer,
                known=truth,
                metadata=prompt.metadata,
            )
            self._answered.append(answered)
            if shows_copies:
                self._answered.append(replace(answered, kind="reconstruction", given=truth, answer=copy))

    def on_test_epoch_end(self) -> None:
        """Judge everything; log a score of each category and split."""
        if self.answers == "shuffled":
            self._answered = shuffled(self._answered)
        judges = openmoji_judges(self.documents, scene_reader(self.drawings))
        judged: list[Judged] = []
        for kind in dict.fromkeys(answered.kind for answered in self._answered):
            if kind not in judges:
                raise ValueError(f"data.parts names {kind!r}, but there are judges of {sorted(judges)} alone")
            answers = [answered for answered in self._answered if answered.kind == kind]
            judged += map(Judged, answers, judges[kind](answers))
        self.judged = _over_ranks(judged)
        self.scores = tally(self.judged, CATEGORIES)
        self.details = tally(self.judged, CATEGORIES, details=True)
        self._answered = []
        self.log_dict({f"test/{score.name}": score.right.value for score in self.scores})

    def _given(self, segment: Any) -> Part:
        if isinstance(segment, TextSegment):
            return self.text_tokenizer.decode(segment.ids)
        return _part(segment)

    @torch.no_grad()
    def _reconstructed(self, prompts: Sequence[Any]) -> list[tuple[Part, ...]]:
        """The known answers, their pictures encoded and decoded."""
        pictures = [part for prompt in prompts for part in prompt.answer if not isinstance(part, str)]
        codes = self.encode([picture.pixels_CHW for picture in pictures], [picture.grids for picture in pictures])
        copies = iter(
            decode_pixels(self.tokenizer, code_N[None], picture.grids, len(picture.grids))[0].numpy()
            for code_N, picture in zip(codes, pictures)
        )
        return [tuple(part if isinstance(part, str) else next(copies) for part in prompt.answer) for prompt in prompts]


def shuffled(answered: Sequence[Answered]) -> list[Answered]:
    """Each prompt with the answer of the next one of its kind and split."""
    groups: dict[tuple[str, str], list[Answered]] = {}
    for one in answered:
        groups.setdefault((one.kind, one.split), []).append(one)
    return [
        replace(one, answer=other.answer)
        for group in groups.values()
        for one, other in zip(group, [*group[1:], group[0]])
    ]


def _part(part: Any) -> Part:
    """A text as it is, the pixels of a picture of a prompt."""
    return part if isinstance(part, str) else part.pixels_CHW.permute(1, 2, 0).cpu().numpy()


def _over_ranks(judged: list[Judged]) -> list[Judged]:
    """Those of all ranks, in the order of the prompts."""
    parts: list[Any] = [judged]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, judged)
    kinds = list(dict.fromkeys(one.answered.kind for part in parts for one in part))
    return sorted(
        (one for part in parts for one in part),
        key=lambda one: (kinds.index(one.answered.kind), one.answered.index),
    )
