"""The Inception network of rFID, from a local file, and the Frechet distance of its features.

The network, its resizing to 299 pixels (TensorFlow 1's bilinear, without antialiasing) and its 2,048 features are
torch-fidelity's, the ones that papers report; the distance is torchmetrics', with sums in float64.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

NUM_FEATURES = 2048
_FILE = (
    "torch-fidelity's weights-inception-2015-12-05-6726825d.pth (pytorch-fid ships the same weights as "
    "pt_inception-2015-12-05-6726825d.pth)"
)


def load_inception(path: str | Path | None) -> nn.Module:
    """Network from uint8 images [B, 3, H, W] to features [B, 2048]; never downloads.

    Raises FileNotFoundError or ValueError, naming the key `evaluation.inception_weights`, for a missing file or one that
    does not fit.
    """
    if path is None or not Path(path).is_file():
        raise FileNotFoundError(
            f"model.evaluation.inception_weights: {path} is not a file; give {_FILE}, or set model.evaluation.rfid to false"
        )
    try:
        # torch-fidelity unpickles whatever the file holds: look first, safely, whether it is plain tensors
        torch.load(path, map_location="cpu", weights_only=True)
        metric = FrechetInceptionDistance(NUM_FEATURES, feature_extractor_weights_path=str(path), antialias=False)
    except (RuntimeError, pickle.UnpicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"model.evaluation.inception_weights: {path} does not hold the weights of Inception v3; give {_FILE}"
        ) from error
    inception: Any = metric.inception
    inception.num_features = NUM_FEATURES  # torchmetrics reads it of a network that it is given
    return inception


def frechet_distance(inception: nn.Module) -> FrechetInceptionDistance:
    """The metric around a network, which many of them may share."""
    metric: Any = FrechetInceptionDistance(inception)
    metric.orig_dtype = torch.float32  # set by updates, missed by `compute` on a rank without images
    return metric
