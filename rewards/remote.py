"""Rewards behind HTTP: models that are too large, or whose packages do not fit beside ours, run as a service.

    POST URL   {"images": [PNG as base64, ...], "prompts": ["...", ...], "metadata": [{...}, ...]}
    answer     {"scores": [0.7, null, ...]}      null where the reward does not apply

Pictures in the metadata ("sources", "reference") travel as PNG too. `rewards/server.py` is such a service.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from nextflow.rewards.picture_file import encode_picture
from nextflow.rewards.reward import Reward


class RemoteReward(Reward):
    """Asks a service, several requests at a time; scores come back in the order of the pictures."""

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 3,
        wait: float = 1.0,
        batch_size: int = 16,
        num_connections: int = 4,
    ) -> None:
        """
        Args:
            url: where to post.
            timeout: seconds until an answer counts as lost.
            retries: how often a request is sent again when the service does not answer or fails (status 5xx).
            wait: seconds before the first retry; doubled before each further one.
            batch_size: pictures of a request.
            num_connections: requests at a time.
        """
        if batch_size < 1 or num_connections < 1 or retries < 0:
            raise ValueError("RemoteReward: batch_size and num_connections must be positive, retries at least 0")
        self.url, self.timeout, self.retries, self.wait = url, timeout, retries, wait
        self.batch_size, self.num_connections = batch_size, num_connections

    def __call__(
        self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """float32 [N].

        Raises:
            RuntimeError: the service did not answer, or not as agreed, after all retries.
        """
        starts = range(0, len(images), self.batch_size)

        def ask(start: int) -> list[float]:
            chosen = slice(start, start + self.batch_size)
            return self._ask(images[chosen], prompts[chosen], metadata[chosen])

        with ThreadPoolExecutor(self.num_connections) as pool:
            return torch.tensor([score for scores in pool.map(ask, starts) for score in scores])

    def _ask(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list:
        body = json.dumps(
            {"images": [_png(image) for image in images], "prompts": list(prompts), "metadata": _plain(list(metadata))}
        ).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return self._scores(answer.read(), len(images))
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {error.read(500).decode(errors='replace').strip()}"
                if error.code < 500:  # the request itself is wrong: sending it again will not help
                    break
            except (OSError, http.client.HTTPException) as error:  # no answer, none in time, or one that breaks off
                failure = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
        raise RuntimeError(
            f"the reward server at {self.url} failed {attempt + 1} times, at last with: {failure}. Start it again and resume "
            "with --ckpt_path: training goes on from the last checkpoint exactly; see also `timeout` and `retries`"
        )

    def _scores(self, answer: bytes, count: int) -> list[float]:
        try:
            scores = json.loads(answer)["scores"]
            values = [float("nan") if score is None else float(score) for score in scores]
        except (ValueError, KeyError, TypeError) as error:
            shown = answer[:200].decode(errors="replace")
            raise RuntimeError(f'{self.url} answered {shown!r} instead of {{"scores": [...]}}') from error
        if len(values) != count:
            raise RuntimeError(f"{self.url} returned {len(values)} scores for {count} pictures")
        return values


def _png(image_CHW: Tensor) -> str:
    return base64.b64encode(encode_picture(image_CHW)).decode()


def _plain(value: Any) -> Any:
    """As JSON types; pictures become PNG files in base64."""
    if isinstance(value, Tensor):
        return {"png": _png(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
