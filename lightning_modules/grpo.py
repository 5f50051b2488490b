"""GRPO: reinforcement learning from rewards of pictures (NextFlow 3.2.5, VAR-RL).

A batch of prompts is one round: every prompt is answered num_generations times by the policy, guidance and all; rewards score
the answers; an answer's advantage is its reward relative to its group; then `num_iterations` optimiser steps on these answers.
The learner scores them without guidance. Old and new log-probabilities come from one function and one packing, so the ratio of
the first inner step is exactly 1.

    grpo_rollouts.py    which answers, and which of their scales are trained (prefix tuning, middle return)
    grpo_scoring.py     what rewards are shown
    grpo_learner.py     answers -> micro-batches of rows, cut behind what is trained
    grpo_objective.py   advantages, clipping, KL, weights of scales
    rewards/            what is good

Memory is bounded by `micro_batch_size`: logits are never held (kernels.linear_cross_entropy), and what lies behind the last
trained scale is not computed. Everything random depends on the prompt's seed, so an interrupted run goes on exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.distributed.tensor import DTensor

from nextflow.generation.requests import GenerationRequest, GenerationResult
from nextflow.generation.sampling import SamplingConfig
from nextflow.kernels.attention import Implementation
from nextflow.lightning_modules.agreement import check_levels
from nextflow.lightning_modules.grpo_learner import MicroBatch, micro_batches, normalise
from nextflow.lightning_modules.grpo_metrics import RunningMeans, add_losses, reward_values
from nextflow.lightning_modules.grpo_objective import (
    ObjectiveConfig,
    group_advantages,
    middle_return,
    policy_loss,
)
from nextflow.lightning_modules.grpo_rollouts import RolloutConfig, Rollouts, Stage, roll_out
from nextflow.lightning_modules.grpo_scoring import ScoredRollouts, shown_to_rewards
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.lightning_modules.sharding import clip_gradients, gathered
from nextflow.lightning_modules.transformer_checkpoint import Weights
from nextflow.models.transformer.config import DecoderConfig
from nextflow.models.transformer.model import Transformer
from nextflow.rewards.mixture import RewardMixture, Scores
from nextflow.rewards.reward import Reward
from nextflow.sequence.image_layout import LayoutConfig

REFERENCE_KEY = "grpo_reference"


class GRPOModule(PretrainingModule):
    """Trains the transformer of a checkpoint on rewards. Batches are PromptBatches (`PromptDataModule`).

    Attributes that callbacks may read:
        last_rollouts: ScoredRollouts of the last training batch.
    """

    objects = (*PretrainingModule.objects, "rewards")

    def __init__(
        self,
        *,
        transformer: DecoderConfig,
        tokenizer: str,
        text_tokenizer: str,
        rewards: dict[str, Reward],
        reward_weights: dict[str, float] | None = None,
        rollouts: RolloutConfig = RolloutConfig(),  # noqa: B008 (frozen)
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 (frozen)
        num_iterations: int = 1,
        micro_batch_size: int = 16,
        generation_batch_size: int = 128,
        max_grad_norm: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        final_learning_rate: float = 1.0,
        initialize_from: str | None = None,
        initialize_weights: Weights = "trained",
        attention: Implementation = "auto",
        layout: LayoutConfig = LayoutConfig(),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        guidance: float = 0.0,
        max_text_tokens: int = 64,
    ) -> None:
        """
        Args:
            transformer: the decoder's shape, that of the checkpoint.
            tokenizer: checkpoint of a TokenizerModule.
            text_tokenizer: folder of a Hugging Face tokenizer.
            rewards: name to reward (`nextflow.rewards`); the names are those of the logs.
            reward_weights: name to weight in the sum; 1 where not given.
            rollouts: answers of a group, and which of their scales are trained.
            objective: advantages, clipping, KL and weights, by TRL's names.
            num_iterations: optimiser steps on the answers of a batch.
            micro_batch_size: answers that the learner scores at once. It changes memory and time, not the gradient.
            generation_batch_size: answers that are generated together.
            max_grad_norm: gradients are scaled down to this norm.
            optimizer: called with the parameter groups.
            warmup_steps: optimiser steps of linear warm-up.
            total_steps: optimiser steps until the cosine ends; null takes what the trainer will run.
            final_learning_rate: fraction of the learning rate at the end; 1 is constant after the warm-up.
            initialize_from: checkpoint to start from, which is also the frozen reference: with beta it has to stay there.
            initialize_weights: which of its weights: "trained", or "ema", their moving average.
            attention: kernel of packed batches.
            layout: that of the checkpoint.
            sampling: how roll-outs, validation and `predict` draw.
            guidance: of roll-outs, validation and `predict`, at the last scale; the learner uses none.
            max_text_tokens: longest text in front of a picture, and that `predict` writes.

        Raises:
            ValueError: a setting is off, or contradicts another one.
        """
        super().__init__(
            transformer=transformer,
            tokenizer=tokenizer,
            text_tokenizer=text_tokenizer,
            optimizer=optimizer,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            final_learning_rate=final_learning_rate,
            initialize_from=initialize_from,
            initialize_weights=initialize_weights,
            attention=attention,
            layout=layout,
            sampling=sampling,
            guidance=guidance,
            max_text_tokens=max_text_tokens,
        )
        if num_iterations < 1 or micro_batch_size < 1 or generation_batch_size < 1:
            raise ValueError("model.num_iterations, micro_batch_size and generation_batch_size must be positive")
        if sampling.greedy:
            raise ValueError("model.sampling.greedy gives a group equal answers: set it to false for GRPO")
        self.automatic_optimization = False  # several optimiser steps on one batch, in micro-batches
        self.rewards = RewardMixture(rewards, reward_weights)
        self.rollouts, self.objective = rollouts, objective
        self.num_iterations, self.micro_batch_size = num_iterations, micro_batch_size
        self.generation_batch_size, self.max_grad_norm = generation_batch_size, max_grad_norm
        self.last_rollouts: ScoredRollouts | None = None
        self._reference_sum: float | None = None
        self._validation: list[Scores] = []
        # Not a submodule, as the tokenizer: checkpoints stay those of a transformer.
        self.reference: Transformer | None
        object.__setattr__(self, "reference", None)

    # Building and checkpoints

    def configure_model(self) -> None:
        """Build the policy, and the reference where beta asks for one. Idempotent."""
        built = self.transformer is not None
        super().configure_model()
        if built or not self.objective.beta or self._trainer is None or self.trainer.state.fn != "fit":
            return
        if self.initialize_from is None:
            raise ValueError(
                "model.objective.beta keeps the policy near its start: name it in model.initialize_from, or set beta to 0"
            )
        reference = self.build(from_start=True).requires_grad_(False).eval()
        self._reference_sum = sum(
            float(_whole(value.double().abs().sum())) for value in reference.state_dict().values()
        )
        object.__setattr__(self, "reference", reference)

    def on_fit_start(self) -> None:
        """The tokenizer and the reference are no submodules, so Lightning does not move them."""
        self.tokenizer.to(self.device)
        if self.reference is not None:
            self.reference.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also note which reference the run keeps near."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[REFERENCE_KEY] = self._reference_sum

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuse to go on with another reference.

        Raises ValueError.
        """
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get(REFERENCE_KEY)
        if self.reference is None or stored is None or self._reference_sum is None:
            return
        # Not for equality: the order of a sum depends on the number of threads and processes.
        if abs(stored - self._reference_sum) > 1e-9 * abs(stored):
            raise ValueError(
                f"model.initialize_from ({self.initialize_from}) is not the checkpoint that this run began with, and its "
                "reference with it: name that one"
            )

    # Training

    def training_step(self, batch, batch_idx: int) -> Any:
        """One round on a PromptBatch: answers, rewards, advantages, and `num_iterations` optimiser steps."""
        check_levels(self, batch.prompts)
        requests = [self.request(prompt) for prompt in batch.prompts]
        stage = self.rollouts.stage(self.trainer.global_step // self.num_iterations)
        rollouts = roll_out(requests, stage, self.rollouts, self._answer)
        prompts = [prompt for prompt in batch.prompts for _ in range(self.rollouts.num_generations)]
        scores = self._score(prompts, rollouts.results)
        reward_N = self._returns(prompts, rollouts, scores)
        advantage_N = self._advantages(reward_N, scores)
        made = self.lay_out(rollouts.results, self._masks(prompts, rollouts.results), stage)
        batches = [
            micro.to(self.device) for micro in normalise(made, len(prompts), self.objective, self._mean_over_ranks)
        ]
        self._optimise(batches, advantage_N.to(self.device))
        images = [result.image for result in rollouts.results if result.image is not None]
        self.last_rollouts = ScoredRollouts(
            [prompt.text for prompt in prompts], images, scores.total_N, self.rollouts.num_generations
        )

    def lay_out(
        self, results: Sequence[GenerationResult], masks: Sequence[Tensor | None], stage: Stage
    ) -> list[MicroBatch]:
        """Answers as micro-batches of the learner, their weights not yet divided by what all ranks have (`normalise`)."""
        return micro_batches(
            results,
            masks,
            stage,
            size=self.micro_batch_size,
            vocabulary=self.config.vocabulary,
            layout=self.layout,
            rollouts=self.rollouts,
            objective=self.objective,
        )

    def _optimise(self, batches: Sequence[MicroBatch], advantage_N: Tensor) -> None:
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        means = RunningMeans()
        references = [None if self.reference is None else self._reference_logprobs(batch) for batch in batches]
        old: list[Tensor] = []
        for iteration in range(self.num_iterations):
            optimizer.zero_grad()
            for index, batch in enumerate(batches):
                logprob_T, entropy_T = self.logprobs(self.transformer, batch)
                if iteration == 0:
                    old.append(logprob_T.detach())
                    means.add("grpo/sampling/sampling_logp_difference/mean", (old[index] - batch.sampler_T).abs())
                loss = policy_loss(logprob_T, old[index], references[index], advantage_N, batch.actions, self.objective)
                self.manual_backward(loss.total)
                means.add("grpo/loss", loss.total * len(batches))
                add_losses(means, loss, entropy_T, batch.actions.scale_T, self.reference is not None)
            norm = clip_gradients(self.transformer.parameters(), self.max_grad_norm)
            means.add("grpo/grad_norm", norm[None])
            optimizer.step()
            scheduler.step()
        self.log_dict(means.values())

    def logprobs(self, transformer: Transformer, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and (detached) entropy of each action [T]. The one function that old, new and reference come from."""
        tokens = transformer.cross_entropy(transformer(batch.rows), batch.rows.target_BL, entropy=True)
        assert tokens.entropy_N is not None
        return tokens.log_prob_N[batch.place_T], tokens.entropy_N[batch.place_T].detach()

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch) -> Tensor:
        assert self.reference is not None
        return self.logprobs(self.reference, batch)[0]

    def _answer(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        from nextflow.generation.engine import generate

        results: list[GenerationResult] = []
        self.transformer.eval()
        with gathered(self.transformer):  # ranks may decode different numbers of steps
            for start in range(0, len(requests), self.generation_batch_size):
                results += generate(
                    self.transformer,
                    requests[start : start + self.generation_batch_size],
                    layout=self.layout,
                    tokenizer=self.tokenizer,
                    sampling=self.sampling,
                    logprobs=True,
                )
        self.transformer.train()
        return results

    # Rewards

    def _score(self, prompts: Sequence[Any], results: Sequence[GenerationResult]) -> Scores:
        return self.rewards(*shown_to_rewards(prompts, results, self.text_tokenizer))

    def _returns(self, prompts: Sequence[Any], rollouts: Rollouts, scores: Scores) -> Tensor:
        """[N] what each answer is trained with: its reward, or the middle return of its completions."""
        if not rollouts.completions:
            return scores.total_N
        further = self.rollouts.num_completions - 1
        prompts = [prompt for prompt in prompts for _ in range(further)]
        more_N = self._score(prompts, rollouts.completions).total_N
        return middle_return(torch.cat([scores.total_N[:, None], more_N.view(-1, further)], dim=1), self.rollouts.eta)

    def _masks(self, prompts: Sequence[Any], results: Sequence[GenerationResult]) -> list[Tensor | None]:
        if not self.rollouts.mask_propagation:
            return [None] * len(results)
        return self.rewards.masks(*shown_to_rewards(prompts, results, self.text_tokenizer))

    def _advantages(self, reward_N: Tensor, scores: Scores) -> Tensor:
        """[N] of this process; the batch's deviation and what is logged are over all processes."""
        every_N = self._over_ranks(reward_N)
        advantages = group_advantages(every_N, self.rollouts.num_generations, self.objective.scale_rewards)
        by_name = {name: self._over_ranks(score_N) for name, score_N in scores.by_name.items()}
        values = reward_values(advantages, by_name)
        self.log("grpo/reward", values.pop("grpo/reward"), prog_bar=True)
        self.log_dict(values)
        start = self.global_rank * len(reward_N)
        return advantages.advantage_N[start : start + len(reward_N)]

    # Validation

    def validation_step(self, batch, batch_idx: int) -> None:
        """One answer for each prompt, drawn with the prompt's own seed: always the same noise."""
        results = self._answer([self.request(prompt) for prompt in batch.prompts])
        self._validation.append(self._score(batch.prompts, results))

    def on_validation_epoch_end(self) -> None:
        """Log val/reward and val/rewards/NAME/mean."""
        means = RunningMeans()
        for scores in self._validation:
            means.add("val/reward", scores.total_N)
            for name, score_N in scores.by_name.items():
                means.add(f"val/rewards/{name}/mean", score_N)
        self._validation = []
        self.log_dict(means.values())

    def on_test_epoch_end(self) -> None:
        """The same as validation, of the test prompts."""
        self.on_validation_epoch_end()

    # Pieces

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing: gradients are exact already, and clipped where they are made."""

    def _over_ranks(self, value_N: Tensor) -> Tensor:
        """[ranks * N], on the CPU."""
        if self.trainer.world_size == 1:
            return value_N
        every: Any = self.all_gather(value_N.to(self.device))
        return every.flatten().cpu()

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        return self._sum_over_ranks(value.to(self.device)).cpu() / self.trainer.world_size


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
