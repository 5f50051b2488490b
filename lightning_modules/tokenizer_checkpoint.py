"""The tokenizer inside a checkpoint of `TokenizerModule`."""

from __future__ import annotations

from pathlib import Path

import torch

from nextflow.evaluation.reconstruction import ReconstructionEvaluation
from nextflow.models.tokenizer.config import PixelConfig, SemanticConfig, TokenizerConfig
from nextflow.models.tokenizer.discriminator import DiscriminatorConfig
from nextflow.models.tokenizer.losses import LossWeights
from nextflow.models.tokenizer.model import Tokenizer
from nextflow.sequence.correction import Correction
from nextflow.sequence.scales import ScaleSchedule


def load_tokenizer(checkpoint_path: str | Path, key: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a `TokenizerModule` checkpoint, frozen and in evaluation mode.

    Args:
        checkpoint_path: a checkpoint that Lightning saved, on any stage.
        key: the configuration key to name in errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint of a `TokenizerModule`, or a folder that FSDP2 wrote.
    """
    if Path(checkpoint_path).is_dir():
        raise ValueError(
            f"{key}: {checkpoint_path} is a folder of shards; train with trainer.strategy: save_distributed_checkpoint "
            "false, which writes one file (a run that resumes from the folder does so too)"
        )
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
_PICKLED = (TokenizerConfig, SemanticConfig, PixelConfig, ScaleSchedule, LossWeights, DiscriminatorConfig, Correction)
torch.serialization.add_safe_globals([*_PICKLED, ReconstructionEvaluation])
