"""What a round of GRPO trains: prefixes, suffixes, codes under a mask, words, edits; on a tiny model."""

from dataclasses import replace

import torch
from PIL import Image

from nextflow.datamodules.prompts import PromptItem
from nextflow.lightning_modules.grpo_objective import ObjectiveConfig, middle_return, policy_loss
from nextflow.lightning_modules.grpo_rollouts import RolloutConfig
from nextflow.tests.lightning_modules.tiny_grpo import (
    PROMPTS,
    Watched,
    built,
    laid_out,
    make,
    prompts,
    trainer,
)


def test_prefix_tuning_leaves_late_scales_out(grpo_folder):
    """Rows end behind the last trained scale; embeddings of later scales and inputs get no gradient; early ones do."""
    module, requests = built(grpo_folder, rollouts=RolloutConfig(num_generations=3, prefix_scales=2))
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


def test_middle_return_trains_prefix_and_suffix_in_turn(grpo_folder):
    config = RolloutConfig(num_generations=3, prefix_scales=2, middle_return=True, num_completions=2, prefix_updates=3)
    assert [config.stage(batch) for batch in range(5)] == ["prefix", "prefix", "prefix", "suffix", "prefix"]
    module, requests = built(grpo_folder, rollouts=config)
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
    fitted = make(grpo_folder, Watched, rollouts=config)
    run = trainer(grpo_folder, max_steps=4)
    run.fit(fitted, datamodule=prompts(grpo_folder))
    # A prefix's return is over two answers, so rewards are asked for twice a batch, and once for suffixes.
    calls = fitted.rewards.rewards["brightness"].calls
    assert len(calls) == 3 * 2 + 1
    scores = [torch.stack([image.float().mean() / 255 for image in images]) for images, _, _ in calls]
    for batch in range(3):
        expected = middle_return(torch.stack(scores[2 * batch : 2 * batch + 2], dim=1), config.eta)
        torch.testing.assert_close(fitted.returns[batch], expected)
        assert not torch.equal(fitted.returns[batch], scores[2 * batch])
    torch.testing.assert_close(fitted.returns[3], scores[-1])


def test_masks_leave_codes_out(grpo_folder):
    rollouts = RolloutConfig(num_generations=3, mask_propagation=True)
    module, requests = built(grpo_folder, rollouts=rollouts)
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
    fitted = make(grpo_folder, Watched, rollouts=rollouts)
    trainer(grpo_folder).fit(fitted, datamodule=prompts(grpo_folder))
    for batch in (batch for batches in fitted.learnt for batch in batches):  # `Brightness` looks at the upper half
        counts = torch.bincount(batch.actions.scale_T, minlength=4) / len(batch.actions.rollout_T.unique())
        assert counts.tolist() == [0, 1, 2, 8]


def test_roll_outs_are_guided_and_the_reference_stays(grpo_folder):
    module = make(grpo_folder, Watched, guidance=2.0, objective=ObjectiveConfig(beta=0.1))
    run = trainer(grpo_folder)
    run.fit(module, datamodule=prompts(grpo_folder))
    assert module.requests and all(request.guidance == 2.0 for request in module.requests)
    start = module.build(from_start=True).state_dict()
    for name, value in module.reference.state_dict().items():
        assert torch.equal(value, start[name])
    assert not torch.equal(module.transformer.head.weight, start["head.weight"])


def test_words_before_the_picture_are_actions_too(grpo_folder):
    module = make(grpo_folder, max_text_tokens=4)
    (batch,) = prompts(grpo_folder, prompts=PROMPTS[:2]).predict_dataloader()
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


def test_edits_reach_the_rewards_with_their_sources(grpo_folder, tmp_path):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    items = [PromptItem(prompt="a red dog", image=str(tmp_path / "blue.png"))]
    module = make(grpo_folder)
    trainer(grpo_folder, max_steps=1).fit(module, datamodule=prompts(grpo_folder, prompts=items))
    ((images, texts, metadata),) = module.rewards.rewards["brightness"].calls
    assert len(images) == 6 and set(texts) == {"a red dog"}
    (source,) = metadata[0]["sources"]
    assert source[2].float().mean() == 255 and metadata[0]["reference"] is None and metadata[0]["text"] == ""
