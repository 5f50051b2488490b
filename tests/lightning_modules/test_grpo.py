"""GRPOModule on a tiny model: parity with roll-outs, ratio 1, resuming, learning, and what it refuses."""

import pytest
import torch

from nextflow.generation.rollouts import action_rows
from nextflow.generation.sampling import SamplingConfig
from nextflow.lightning_modules.grpo_objective import ObjectiveConfig, policy_loss
from nextflow.lightning_modules.grpo_rollouts import RolloutConfig
from nextflow.lightning_modules.pretraining import PretrainingModule
from nextflow.tests.lightning_modules.tiny_grpo import Brightness, built, laid_out, make, prompts, trainer


def weights(module):
    return {name: value.clone() for name, value in module.transformer.state_dict().items()}


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_learner_scores_what_the_roll_out_scored(grpo_folder, guidance):
    """Guidance, temperature and top-p change what is drawn, and not what a drawn code's log-probability is."""
    sampling = SamplingConfig(temperature=[0.8, 1.2], top_p=0.9)
    module, requests = built(grpo_folder, guidance=guidance, sampling=sampling)
    rollouts, batches = laid_out(module, requests)
    assert len(rollouts.results) == 9 and len(batches) == 3
    assert len({tuple(result.codes.tolist()) for result in rollouts.results}) > 6
    with torch.no_grad():
        for batch in batches:
            logprob_T, _ = module.logprobs(module.transformer, batch)
            torch.testing.assert_close(logprob_T, batch.sampler_T, rtol=0, atol=1e-4)
    every = torch.cat([batch.sampler_T for batch in batches])
    assert len(every) == 9 * 21


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_loss_is_that_of_one_large_batch_and_of_the_formula(grpo_folder, loss_type):
    """Gradients of micro-batches of 2 == of one of 9 == of the sum over codes written out."""
    gradients = []
    objective = ObjectiveConfig(alpha=0.6, loss_type=loss_type)
    advantage_N = torch.linspace(-1, 1, 9)
    for size in (2, 9):
        module, requests = built(grpo_folder, micro_batch_size=size, objective=objective)
        _, batches = laid_out(module, requests)
        for batch in batches:
            logprob_T, _ = module.logprobs(module.transformer, batch)
            policy_loss(logprob_T, logprob_T.detach(), None, advantage_N, batch.actions, objective).total.backward()
        gradients.append({name: value.grad for name, value in module.transformer.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    module, requests = built(grpo_folder, objective=objective)
    rollouts, _ = laid_out(module, requests)
    k = torch.tensor([1.0, *[4**-0.6] * 4, *[16**-0.6] * 16])
    rows = action_rows(rollouts.results, module.config.vocabulary, module.layout)
    tokens = module.transformer.cross_entropy(module.transformer(rows), rows.target_BL)
    logprob_NK = tokens.log_prob_N[rows.target_BL.flatten() != -100].view(9, 21)
    # At ratio 1 the gradient of ratio * A is A times that of the log-probability.
    loss = -((logprob_NK * (k / k.sum())).sum(dim=1) * advantage_N).mean()
    loss.backward()
    for name, value in module.transformer.named_parameters():
        torch.testing.assert_close(value.grad, gradients[0][name], rtol=1e-4, atol=1e-7)


def test_ratio_is_exactly_one_until_weights_change(grpo_folder):
    """Two inner steps with learning rate 0: old and new come from different passes and are equal to the last bit."""
    module = make(grpo_folder, num_iterations=2, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    run = trainer(grpo_folder)
    run.fit(module, datamodule=prompts(grpo_folder))
    assert run.callback_metrics["grpo/ratio"] == 1.0
    assert run.global_step == 2
    moving = make(grpo_folder, num_iterations=2)
    run = trainer(grpo_folder)
    run.fit(moving, datamodule=prompts(grpo_folder))
    assert run.callback_metrics["grpo/ratio"] != 1.0


def test_logs(grpo_folder):
    module = make(grpo_folder, objective=ObjectiveConfig(beta=0.1), rewards={"a": Brightness(), "b": Brightness()})
    run = trainer(grpo_folder)
    run.fit(module, datamodule=prompts(grpo_folder))
    for name in ("reward", "reward_std", "rewards/a/mean", "rewards/b/std", "frac_reward_zero_std", "kl", "entropy", "ratio",
                 "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "clip_ratio/scale_03", "grad_norm",
                 "sampling/sampling_logp_difference/mean", "loss"):  # fmt: skip
        assert run.callback_metrics[f"grpo/{name}"].isfinite(), name
    assert run.callback_metrics["grpo/reward"] == pytest.approx(2 * run.callback_metrics["grpo/rewards/a/mean"])
    assert run.callback_metrics["grpo/kl"] > 0  # of the second step
    per_reward = [
        torch.stack([image.float().mean() / 255 for image in call[0]]) for call in module.rewards.rewards["b"].calls
    ]
    assert run.callback_metrics["grpo/rewards/b/std"] == pytest.approx(float(per_reward[-1].std()), rel=1e-4)
    last = module.last_rollouts
    assert len(last.images) == len(last.prompts) == len(last.rewards) == 6 and last.prompts[0] == last.prompts[2]


def test_a_level_that_was_not_trained_is_refused(grpo_folder):
    module = make(grpo_folder)
    module.trained_levels = {32}
    with pytest.raises(ValueError, match=r"data\.level: pictures of level 16 are asked for.*trained at level 32 alone"):
        trainer(grpo_folder).fit(module, datamodule=prompts(grpo_folder, level=16))


@pytest.mark.parametrize("in_turn", [False, True])
def test_an_interrupted_run_goes_on_exactly(grpo_folder, tmp_path, in_turn):
    prefix = {"prefix_scales": 2, "middle_return": True, "prefix_updates": 1} if in_turn else {}
    options = {
        "rollouts": RolloutConfig(num_generations=3, **prefix),
        "objective": ObjectiveConfig(beta=0.05),
        "num_iterations": 2,
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        "total_steps": 8,
    }
    straight = make(grpo_folder, **options)
    trainer(grpo_folder, max_steps=8).fit(straight, datamodule=prompts(grpo_folder))
    first = make(grpo_folder, **options)
    run = trainer(grpo_folder, max_steps=4)
    run.fit(first, datamodule=prompts(grpo_folder))
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = make(grpo_folder, **options)
    trainer(grpo_folder, max_steps=8).fit(second, datamodule=prompts(grpo_folder), ckpt_path=tmp_path / "half.ckpt")
    for name, value in weights(straight).items():
        assert torch.equal(weights(second)[name], value), name
    assert not torch.equal(weights(first)["head.weight"], weights(straight)["head.weight"])
    # The checkpoint is a transformer's like any other, and its reference is the one it began with.
    assert PretrainingModule.load_from_checkpoint(tmp_path / "half.ckpt", strict=True).transformer is not None
    with pytest.raises(ValueError, match="is not the checkpoint that this run began with"):
        other = make(grpo_folder, **{**options, "initialize_from": str(tmp_path / "half.ckpt")})
        trainer(grpo_folder, max_steps=8).fit(other, datamodule=prompts(grpo_folder), ckpt_path=tmp_path / "half.ckpt")


def test_it_learns_what_is_rewarded(grpo_folder):
    """Brighter pictures on held-out noise. The untrained decoder has little to offer: groups spread by 0.003 at first."""
    module = make(
        grpo_folder,
        rollouts=RolloutConfig(num_generations=8),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-2),
        micro_batch_size=16,
    )
    data = prompts(grpo_folder, seed=7)
    before = trainer(grpo_folder, limit_val_batches=1.0)
    module.transformer = module.build(from_start=True)
    (start,) = before.validate(module, datamodule=data, verbose=False)
    trainer(grpo_folder, max_steps=30).fit(module, datamodule=data)
    (end,) = before.validate(module, datamodule=data, verbose=False)
    assert end["val/reward"] > start["val/reward"] + 0.004
    assert end["val/reward"] == end["val/rewards/brightness/mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": SamplingConfig(greedy=True)}, r"model\.sampling\.greedy"),
        ({"rewards": {}}, r"model\.rewards is empty"),
        ({"num_iterations": 0}, r"model\.num_iterations"),
        ({"objective": ObjectiveConfig(beta=0.1), "initialize_from": None}, r"model\.initialize_from"),
        ({"rollouts": RolloutConfig(num_generations=2, prefix_scales=3, middle_return=True)}, "lower prefix_scales"),
    ],
)
def test_wrong_settings_name_their_key(grpo_folder, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(grpo_folder).fit(make(grpo_folder, **options), datamodule=prompts(grpo_folder))
