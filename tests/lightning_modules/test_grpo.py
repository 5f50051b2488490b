"""GRPOModule on a tiny model: parity with roll-outs, ratio 1, prefix tuning, resuming, learning, and what it refuses."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from PIL import Image

from nextflow.datamodules.prompts import PromptDataModule, PromptItem
from nextflow.generation.rollouts import action_rows
from nextflow.generation.sampling import SamplingConfig
from nextflow.lightning_modules.grpo import GRPOModule
from nextflow.lightning_modules.grpo_learner import micro_batches, normalise
from nextflow.lightning_modules.grpo_objective import ObjectiveConfig, middle_return, policy_loss
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    write_models(folder)
    return folder


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
    made = micro_batches(
        rollouts.results,
        masks or [None] * len(rollouts.results),
        stage,
        size=module.micro_batch_size,
        vocabulary=module.config.vocabulary,
        layout=module.layout,
        rollouts=module.rollouts,
        objective=module.objective,
    )
    return rollouts, normalise(made, len(rollouts.results), module.objective, lambda value: value)


def weights(module):
    return {name: value.clone() for name, value in module.transformer.state_dict().items()}


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_learner_scores_what_the_roll_out_scored(folder, guidance):
    """Guidance, temperature and top-p change what is drawn, and not what a drawn code's log-probability is."""
    sampling = SamplingConfig(temperature=[0.8, 1.2], top_p=0.9)
    module, requests = built(folder, guidance=guidance, sampling=sampling)
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
def test_the_loss_is_that_of_one_large_batch_and_of_the_formula(folder, loss_type):
    """Gradients of micro-batches of 2 == of one of 9 == of the sum over codes written out."""
    gradients = []
    objective = ObjectiveConfig(alpha=0.6, loss_type=loss_type)
    advantage_N = torch.linspace(-1, 1, 9)
    for size in (2, 9):
        module, requests = built(folder, micro_batch_size=size, objective=objective)
        _, batches = laid_out(module, requests)
        for batch in batches:
            logprob_T, _ = module.logprobs(module.transformer, batch)
            policy_loss(logprob_T, logprob_T.detach(), None, advantage_N, batch.actions, objective).total.backward()
        gradients.append({name: value.grad for name, value in module.transformer.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    module, requests = built(folder, objective=objective)
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


def test_ratio_is_exactly_one_until_weights_change(folder):
    """Two inner steps with learning rate 0: old and new come from different passes and are equal to the last bit."""
    module = make(folder, num_iterations=2, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    run = trainer(folder)
    run.fit(module, datamodule=prompts(folder))
    assert run.callback_metrics["grpo/ratio"] == 1.0
    assert run.global_step == 2
    moving = make(folder, num_iterations=2)
    run = trainer(folder)
    run.fit(moving, datamodule=prompts(folder))
    assert run.callback_metrics["grpo/ratio"] != 1.0


def test_logs(folder):
    module = make(folder, objective=ObjectiveConfig(beta=0.1), rewards={"a": Brightness(), "b": Brightness()})
    run = trainer(folder)
    run.fit(module, datamodule=prompts(folder))
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


def test_prefix_tuning_leaves_late_scales_out(folder):
    """Rows end behind the last trained scale; embeddings of later scales and inputs get no gradient; early ones do."""
    module, requests = built(folder, rollouts=RolloutConfig(num_generations=3, prefix_scales=2))
    _, batches = laid_out(module, requests)
    assert {scale for batch in batches for scale in batch.actions.scale_T.tolist()} == {1, 2}
    longest = max(len(request.segments[0].ids) for request in requests)
    assert max(batch.rows.ids_BL.shape[1] for batch in batches) == 1 + longest + 5  # start, prompt, 1 + 4 cells
    for batch in batches:
        logprob_T, _ = module.logprobs(module.transformer, batch)
        torch.testing.assert_close(logprob_T.detach(), batch.sampler_T, rtol=0, atol=1e-4)
        policy_loss(
            logprob_T, logprob_T.detach(), None, torch.randn(9), batch.actions, module.objective
        ).total.backward()
    gradient = module.transformer.scale_embedding.weight.grad
    assert gradient[1:3].abs().sum(dim=1).gt(0).all() and not gradient[3:].any()


def test_middle_return_trains_prefix_and_suffix_in_turn(folder):
    config = RolloutConfig(num_generations=3, prefix_scales=2, middle_return=True, num_completions=2, prefix_updates=3)
    assert [config.stage(batch) for batch in range(5)] == ["prefix", "prefix", "prefix", "suffix", "prefix"]
    module, requests = built(folder, rollouts=config)
    prefix, batches = laid_out(module, requests, "prefix")
    assert len(prefix.results) == len(prefix.completions) == 9
    for result, completion in zip(prefix.results, prefix.completions):
        assert torch.equal(result.codes[:5], completion.codes[:5]) and not torch.equal(result.codes, completion.codes)
    assert {scale for batch in batches for scale in batch.actions.scale_T.tolist()} == {1, 2}
    suffix, batches = laid_out(module, requests, "suffix")
    for start in range(0, 9, 3):
        group = [result.codes for result in suffix.results[start : start + 3]]
        assert all(torch.equal(codes[:5], group[0][:5]) for codes in group)
        assert len({tuple(codes.tolist()) for codes in group}) == 3
    assert all(set(batch.actions.scale_T.tolist()) == {3} for batch in batches)
    for batch in batches:
        with torch.no_grad():
            torch.testing.assert_close(
                module.logprobs(module.transformer, batch)[0], batch.sampler_T, rtol=0, atol=1e-4
            )
    fitted = make(folder, Watched, rollouts=config)
    run = trainer(folder, max_steps=4)
    run.fit(fitted, datamodule=prompts(folder))
    # A prefix's return is over two answers, so rewards are asked for twice a batch, and once for suffixes.
    calls = fitted.rewards.rewards["brightness"].calls
    assert len(calls) == 3 * 2 + 1
    scores = [torch.stack([image.float().mean() / 255 for image in images]) for images, _, _ in calls]
    for batch in range(3):
        expected = middle_return(torch.stack(scores[2 * batch : 2 * batch + 2], dim=1), config.eta)
        torch.testing.assert_close(fitted.returns[batch], expected)
        assert not torch.equal(fitted.returns[batch], scores[2 * batch])
    torch.testing.assert_close(fitted.returns[3], scores[-1])


def test_masks_leave_codes_out(folder):
    rollouts = RolloutConfig(num_generations=3, mask_propagation=True)
    module, requests = built(folder, rollouts=rollouts)
    upper = torch.zeros(32, 32, dtype=torch.bool)
    upper[:16] = True
    _, batches = laid_out(module, requests, masks=[upper] * 9)
    for batch in batches:  # of 1, 4 and 16 cells the upper half, and the one that covers all
        counts = torch.bincount(batch.actions.scale_T, minlength=4) / len(batch.actions.rollout_T.unique())
        assert counts.tolist() == [0, 1, 2, 8]
        with torch.no_grad():
            torch.testing.assert_close(
                module.logprobs(module.transformer, batch)[0], batch.sampler_T, rtol=0, atol=1e-4
            )
    fitted = make(folder, Watched, rollouts=rollouts)
    trainer(folder).fit(fitted, datamodule=prompts(folder))
    for batch in (batch for batches in fitted.learnt for batch in batches):  # `Brightness` looks at the upper half
        counts = torch.bincount(batch.actions.scale_T, minlength=4) / len(batch.actions.rollout_T.unique())
        assert counts.tolist() == [0, 1, 2, 8]


def test_roll_outs_are_guided_and_the_reference_stays(folder):
    module = make(folder, Watched, guidance=2.0, objective=ObjectiveConfig(beta=0.1))
    run = trainer(folder)
    run.fit(module, datamodule=prompts(folder))
    assert module.requests and all(request.guidance == 2.0 for request in module.requests)
    start = module.build(from_start=True).state_dict()
    for name, value in module.reference.state_dict().items():
        assert torch.equal(value, start[name])
    assert not torch.equal(module.transformer.head.weight, start["head.weight"])


def test_a_level_that_was_not_trained_is_refused(folder):
    module = make(folder)
    module.trained_levels = {32}
    with pytest.raises(ValueError, match=r"data\.level: pictures of level 16 are asked for.*trained at level 32 alone"):
        trainer(folder).fit(module, datamodule=prompts(folder, level=16))


@pytest.mark.parametrize("in_turn", [False, True])
def test_an_interrupted_run_goes_on_exactly(folder, tmp_path, in_turn):
    prefix = {"prefix_scales": 2, "middle_return": True, "prefix_updates": 1} if in_turn else {}
    options = {
        "rollouts": RolloutConfig(num_generations=3, **prefix),
        "objective": ObjectiveConfig(beta=0.05),
        "num_iterations": 2,
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        "total_steps": 8,
    }
    straight = make(folder, **options)
    trainer(folder, max_steps=8).fit(straight, datamodule=prompts(folder))
    first = make(folder, **options)
    run = trainer(folder, max_steps=4)
    run.fit(first, datamodule=prompts(folder))
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = make(folder, **options)
    trainer(folder, max_steps=8).fit(second, datamodule=prompts(folder), ckpt_path=tmp_path / "half.ckpt")
    for name, value in weights(straight).items():
        assert torch.equal(weights(second)[name], value), name
    assert not torch.equal(weights(first)["head.weight"], weights(straight)["head.weight"])
    # The checkpoint is a transformer's like any other, and its reference is the one it began with.
    assert PretrainingModule.load_from_checkpoint(tmp_path / "half.ckpt", strict=True).transformer is not None
    with pytest.raises(ValueError, match="is not the checkpoint that this run began with"):
        other = make(folder, **{**options, "initialize_from": str(tmp_path / "half.ckpt")})
        trainer(folder, max_steps=8).fit(other, datamodule=prompts(folder), ckpt_path=tmp_path / "half.ckpt")


def test_it_learns_what_is_rewarded(folder):
    """Brighter pictures on held-out noise. The untrained decoder has little to offer: groups spread by 0.003 at first."""
    module = make(
        folder,
        rollouts=RolloutConfig(num_generations=8),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=2e-2),
        micro_batch_size=16,
    )
    data = prompts(folder, seed=7)
    before = trainer(folder, limit_val_batches=1.0)
    module.transformer = module.build(from_start=True)
    (start,) = before.validate(module, datamodule=data, verbose=False)
    trainer(folder, max_steps=30).fit(module, datamodule=data)
    (end,) = before.validate(module, datamodule=data, verbose=False)
    assert end["val/reward"] > start["val/reward"] + 0.004
    assert end["val/reward"] == end["val/rewards/brightness/mean"]


def test_edits_reach_the_rewards_with_their_sources(folder, tmp_path):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    items = [PromptItem(prompt="a red dog", image=str(tmp_path / "blue.png"))]
    module = make(folder)
    trainer(folder, max_steps=1).fit(module, datamodule=prompts(folder, prompts=items))
    ((images, texts, metadata),) = module.rewards.rewards["brightness"].calls
    assert len(images) == 6 and set(texts) == {"a red dog"}
    (source,) = metadata[0]["sources"]
    assert source[2].float().mean() == 255 and metadata[0]["reference"] is None and metadata[0]["text"] == ""


def test_words_before_the_picture_are_actions_too(folder):
    module = make(folder, max_text_tokens=4)
    (batch,) = prompts(folder, prompts=PROMPTS[:2]).predict_dataloader()
    requests = [replace(module.request(prompt), task="reasoning") for prompt in batch.prompts]
    module.transformer = module.build(from_start=True)
    rollouts, batches = laid_out(module, requests)
    counts = [
        int((torch.cat([b.actions.scale_T[b.actions.rollout_T == n] for b in batches]) == 0).sum()) for n in range(6)
    ]
    drawn = [int(result.is_action.sum()) - 21 for result in rollouts.results]
    assert counts == drawn and max(drawn) > 0
    for batch in batches:
        with torch.no_grad():
            torch.testing.assert_close(
                module.logprobs(module.transformer, batch)[0], batch.sampler_T, rtol=0, atol=1e-4
            )


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
def test_wrong_settings_name_their_key(folder, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(folder).fit(make(folder, **options), datamodule=prompts(folder))
