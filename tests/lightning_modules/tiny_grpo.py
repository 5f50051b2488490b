"""A tiny GRPO run: models, prompts, a reward, and a module that remembers what its rounds hand on."""

import lightning as L
import torch

from nextflow.datamodules.prompts import PromptDataModule
from nextflow.lightning_modules.grpo import GRPOModule
from nextflow.lightning_modules.grpo_learner import normalise
from nextflow.lightning_modules.grpo_rollouts import RolloutConfig, roll_out
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.lightning_modules.tokenizer import TokenizerModule
from nextflow.models.tokenizer.config import PixelConfig, TokenizerConfig
from nextflow.models.transformer.config import DecoderConfig
from nextflow.rewards.reward import Reward
from nextflow.sequence.scales import ScaleSchedule
from nextflow.sequence.text_tokenizer import train_text_tokenizer

SCHEDULE = ScaleSchedule(sides=(1, 2, 4), levels={16: 2, 32: 3}, stride=8, base_grids=((2, 8), (4, 4), (8, 2)))
DECODER = DecoderConfig(
    width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48, rope_sections=(2, 1, 1), max_scales=4
)
PROMPTS = ["a red dog", "two blue cats, one red dog", "a cat"]


class Brightness(Reward):
    """Mean of a picture, 0 to 1; remembers what it was shown, and looks at the upper half alone."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts, metadata):
        self.calls.append((list(images), list(prompts), list(metadata)))
        return torch.stack([image.float().mean() / 255 for image in images])

    def masks(self, images, prompts, metadata):
        masks = [torch.zeros(image.shape[1:], dtype=torch.bool) for image in images]
        for mask in masks:
            mask[: mask.shape[0] // 2] = True
        return masks


def write_models(folder):
    """A tiny tokenizer, text tokenizer and transformer."""
    train_text_tokenizer(PROMPTS, folder / "text", size=300)
    pixel = PixelConfig(width=8, multipliers=(1, 1, 1, 1), num_blocks=1, latent_width=8, groups=4, attention=False)
    config = TokenizerConfig(schedule=SCHEDULE, codebook_size=17, pixel_dim=4, semantic=None, pixel=pixel)
    torch.manual_seed(0)
    save(TokenizerModule(config, stage="pixel"), folder / "tokenizer.ckpt")
    save(PretrainingModule(**paths(folder)), folder / "start.ckpt")


def save(module, path):
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", max_steps=1)
    module.configure_model()
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)


def paths(folder):
    return {
        "transformer": DECODER,
        "tokenizer": str(folder / "tokenizer.ckpt"),
        "text_tokenizer": str(folder / "text"),
    }


class Watched(GRPOModule):
    """Remembers what a round hands on: requests, returns, and what the learner gets."""

    def __init__(self, **options):
        super().__init__(**options)
        self.requests, self.returns, self.learnt = [], [], []

    def _answer(self, requests):
        self.requests += requests
        return super()._answer(requests)

    def _advantages(self, reward_N, scores):
        self.returns.append(reward_N)
        return super()._advantages(reward_N, scores)

    def _optimise(self, batches, advantage_N):
        self.learnt.append(batches)
        super()._optimise(batches, advantage_N)


def make(folder, module=GRPOModule, **changes):
    torch.manual_seed(0)
    options = {
        "rewards": {"brightness": Brightness()},
        "rollouts": RolloutConfig(num_generations=3),
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=1.0),
        "initialize_from": str(folder / "start.ckpt"),
        "micro_batch_size": 4,
    }
    return module(**paths(folder), **{**options, **changes})


def prompts(folder, **changes):
    options = {"level": 32, "prompts": PROMPTS, "batch_size": 2, "aspect_ratio": 1.0}
    return PromptDataModule(text_tokenizer=str(folder / "text"), schedule=SCHEDULE, **{**options, **changes})


def trainer(folder, **changes):
    options = {
        "max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, "default_root_dir": folder, "limit_val_batches": 0,
    }  # fmt: skip
    return L.Trainer(**{**options, **changes})


def built(folder, **changes):
    """A module with weights, and the requests of the three prompts."""
    module = make(folder, **changes)
    module.transformer = module.build(from_start=True)
    batches = list(prompts(folder).predict_dataloader())
    return module, [module.request(prompt) for batch in batches for prompt in batch.prompts]


def laid_out(module, requests, stage="whole", masks=None):
    rollouts = roll_out(requests, stage, module.rollouts, module._answer)
    made = module.lay_out(rollouts.results, masks or [None] * len(rollouts.results), stage)
    return rollouts, normalise(made, len(rollouts.results), module.objective, lambda value: value)
