"""What a reward is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class Reward(ABC):
    """Scores pictures. The import path of a subclass stands in the config, at `model.rewards.NAME`.

    A reward looks at what it is given and at nothing else, and gives the same picture the same score each time.
    """

    @abstractmethod
    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """Score pictures, better is higher.

        Args:
            images: uint8 [3, H, W] on the CPU, of any mix of sizes.
            prompts: the text of each prompt.
            metadata: of each prompt what its sample holds, and besides "sources", the pictures of the prompt (list of uint8
                [3, H, W]), "reference", the known result (uint8 [3, H, W], or None), and "text", what was written in front of
                the picture ("" for none).

        Returns:
            float32 [N] on the CPU, NaN where the reward does not apply to a prompt.
        """

    def masks(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[Tensor | None]:
        """Where in each picture the score comes from: bool [H, W], or None for everywhere. Used by mask propagation."""
        return [None] * len(images)
