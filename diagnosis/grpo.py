"""What can go wrong in reinforcement learning: a policy that runs away, groups that teach nothing, rewards that are gamed."""

from __future__ import annotations

from collections.abc import Iterator

from nextflow.diagnosis.finding import Finding, Missing, number
from nextflow.diagnosis.run import TrainingRun
from nextflow.diagnosis.training import said, slower


def check_reward(run: TrainingRun) -> Iterator[Finding | Missing]:
    """The reward rises, of held-out prompts too."""
    reward, held_out = run.curve("grpo/reward"), run.curve("val/reward")
    if reward is None or len(reward) < 5:
        yield Missing("whether the reward rises", "five steps of grpo/reward")
        return
    if held_out is None or len(held_out) < 2:
        yield Missing("the reward of held-out prompts", "val/reward: trainer.val_check_interval")
    elif held_out.last < held_out.value_N[0] and reward.change > 0:
        yield Finding(
            severity="warning",
            about="reward",
            seen=f"val/reward fell from {number(held_out.value_N[0])} to {number(held_out.last)}, while grpo/reward rose from "
            f"{number(reward.start)} to {number(reward.end)}",
            expected="both rise",
            advice=f"train on more prompts or for fewer steps, and raise {said(run, 'model.objective.beta')}",
        )
    if reward.change < 0:
        yield Finding(
            severity="fault",
            about="reward",
            seen=f"grpo/reward fell from {number(reward.start)} to {number(reward.end)}",
            expected="a reward that rises",
            advice=slower(run) + f"; train fewer scales: {said(run, 'model.rollouts.prefix_scales')}",
        )
    elif reward.change == 0:
        yield Finding(
            severity="warning",
            about="reward",
            seen=f"grpo/reward went from {number(reward.start)} to {number(reward.end)}, which its noise may explain",
            expected="a reward that rises",
            advice=f"train longer, on larger batches ({said(run, 'data.batch_size')}, "
            f"{said(run, 'model.rollouts.num_generations')})",
        )
    for name in sorted(run.curves):
        one = run.curve(name) if name.startswith("grpo/rewards/") and name.endswith("/mean") else None
        if one is not None and len(one) >= 5 and one.change < 0 < reward.change:
            yield Finding(
                severity="note",
                about="reward",
                seen=f"{name} fell from {number(one.start)} to {number(one.end)}, while their sum rose",
                expected="all of them rise",
                advice=f"raise its weight in model.reward_weights, if {name.split('/')[2]} is worth it",
            )


def check_policy(run: TrainingRun) -> Iterator[Finding | Missing]:
    """The policy stays near where it began, and keeps choosing among several answers."""
    kl, entropy = run.curve("grpo/kl"), run.curve("grpo/entropy")
    if kl is None:
        yield Missing("how far the policy went", "grpo/kl: model.objective.beta above 0")
    elif kl.end > 0.5:
        yield Finding(
            severity="fault" if kl.end > 2 else "warning",
            about="KL",
            seen=f"grpo/kl is {number(kl.end)} at the end, up from {number(kl.start)}",
            expected="below 0.5: pictures usually get worse beyond, whatever the reward says",
            advice=f"raise {said(run, 'model.objective.beta')}, lower {said(run, 'model.optimizer.lr')} or stop earlier",
        )
    if entropy is not None and len(entropy) >= 5 and entropy.end < 0.3 * entropy.start:
        yield Finding(
            severity="warning",
            about="entropy",
            seen=f"grpo/entropy fell from {number(entropy.start)} to {number(entropy.end)}: the answers to a prompt grow alike",
            expected="a slow fall at most",
            advice=f"raise {said(run, 'model.objective.beta')} or {said(run, 'model.objective.epsilon_high')}, or lower "
            f"{said(run, 'model.optimizer.lr')}",
        )
    elif entropy is not None and len(entropy) >= 5 and entropy.change > 0 and entropy.end > 1.5 * entropy.start:
        yield Finding(
            severity="warning",
            about="entropy",
            seen=f"grpo/entropy rose from {number(entropy.start)} to {number(entropy.end)}: the policy is less and less sure",
            expected="a slow fall",
            advice=f"lower {said(run, 'model.optimizer.lr')}, or average over more answers ({said(run, 'data.batch_size')})",
        )


def check_groups(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Most groups hold answers of different rewards."""
    equal = run.curve("grpo/frac_reward_zero_std")
    if equal is not None and equal.end > 0.5:
        yield Finding(
            severity="warning",
            about="groups",
            seen=f"in {equal.end:.0%} of the groups all answers have one reward (grpo/frac_reward_zero_std) and teach nothing",
            expected="below 50 %",
            advice=f"raise {said(run, 'model.sampling.temperature')} or {said(run, 'model.rollouts.num_generations')}, choose "
            "prompts that are neither too easy nor too hard, or a reward with more shades",
        )


def check_ratios(run: TrainingRun) -> Iterator[Finding | Missing]:
    """Old and new policy agree before the first inner step, and not much is clipped."""
    ratio, clipped = run.curve("grpo/ratio"), run.curve("grpo/clip_ratio/region_mean")
    iterations = run.setting("model.num_iterations", 1)
    if ratio is not None and iterations == 1 and (far := abs(ratio.value_N - 1).max()) > 1e-3:
        yield Finding(
            severity="fault",
            about="ratio",
            seen=f"grpo/ratio is off 1 by {number(far)}, though every answer is used for one step",
            expected="1, as the same weights made and score the answers",
            advice="look for dropout or anything else that differs between two forward passes of model.transformer",
        )
    if clipped is not None and clipped.end > 0.2:
        yield Finding(
            severity="warning",
            about="clipping",
            seen=f"{clipped.end:.0%} of the actions are clipped (grpo/clip_ratio/region_mean)",
            expected="below 20 %",
            advice=f"lower {said(run, 'model.optimizer.lr')} or {said(run, 'model.num_iterations')}",
        )
    apart = run.curve("grpo/sampling/sampling_logp_difference/mean")
    if apart is not None and apart.value_N.max() > 0.05:
        yield Finding(
            severity="warning",
            about="ratio",
            seen=f"generation and learner disagree on log-probabilities by {number(apart.value_N.max())} in the mean "
            "(grpo/sampling/sampling_logp_difference/mean)",
            expected="rounding: below 0.05",
            advice="use trainer.precision 32-true, or see that nothing differs between how answers are drawn and scored",
        )


GRPO = (check_reward, check_policy, check_groups, check_ratios)
