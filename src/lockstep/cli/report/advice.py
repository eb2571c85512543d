"""Advice where a run is ill: each illness is a rule over the run's metrics, and has a remedy.

The first and the last steps are compared: a third of the run each, ten steps at most. The limits
are far from what right runs show (docs/how-to/not-learning.md), so that a right run gets no advice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

Metrics = Mapping[int, Mapping[str, float]]

_FEWEST = 4
"""Trained steps before anything is said of a trend."""
_WINDOW = 10


@dataclass(frozen=True)
class Advice:
    """illness: its name, in the page's link to the guide.
    says: what was measured.
    remedy: what to do.
    """

    illness: str
    says: str
    remedy: str


@dataclass(frozen=True)
class _Run:
    """The trained steps' metrics, in order."""

    steps: Sequence[Mapping[str, float]]

    def values(self, name: str, steps: Sequence[Mapping[str, float]] | None = None) -> list[float]:
        chosen = self.steps if steps is None else steps
        return [value for step in chosen if (value := step.get(name)) is not None and math.isfinite(value)]

    @property
    def size(self) -> int:
        return max(1, min(_WINDOW, len(self.steps) // 3))

    def first(self, name: str) -> float:
        """Mean over the first steps; NaN where the metric is missing."""
        return _mean(self.values(name, self.steps[: self.size]))

    def last(self, name: str) -> float:
        """Mean over the last steps; NaN where the metric is missing."""
        return _mean(self.values(name, self.steps[-self.size :]))

    def learned(self) -> bool:
        """The reward rose by more than a third of its spread within a step."""
        return self.last("reward") - self.first("reward") > max(self.first("reward_std"), 1e-6) / 3


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _rewards_equal(run: _Run) -> Advice | None:
    spreads, rewards = run.values("reward_std"), run.values("reward")
    if not spreads or max(spreads) > 1e-9 or max(rewards) - min(rewards) > 1e-9:
        return None
    return Advice(
        "rewards-equal",
        f"Every trajectory of all {len(rewards)} steps has the reward {rewards[0]:g}.",
        "Read a transcript below and compute its reward by hand: most often the reward function never matches the reply, or a "
        "parser fails. A reward that is right and always lowest needs an easier task, or a start from demonstrations.",
    )


def _zero_variance(run: _Run) -> Advice | None:
    if _rewards_equal(run) or _truncated(run):
        return None  # the cause is said already
    share = run.last("groups_without_signal") / run.last("groups")
    if not share > 0.5:
        return None
    return Advice(
        "zero-variance",
        f"In {share:.0%} of the last groups all rewards are equal: these teach nothing.",
        "Choose scenarios that the model solves sometimes: drop those that are always or never solved, raise group_size or "
        "temperature, or give rewards for a part of the work.",
    )


def _truncated(run: _Run) -> Advice | None:
    share = run.last("replies_truncated")
    if not share > 0.8:
        return None
    return Advice(
        "truncated",
        f"A limit of tokens cuts off {share:.0%} of the last replies.",
        "Raise max_tokens in the rollout or max_model_len in [backend]; or ask for shorter replies, with a reward that a cut reply "
        "can't earn. mask_truncated leaves cut replies out of the loss.",
    )


def _entropy(run: _Run) -> Advice | None:
    first, last = run.first("entropy"), run.last("entropy")
    if not (first > 0.02 and last < first / 5) or run.learned():
        return None
    return Advice(
        "entropy-collapse",
        f"The entropy fell from {first:.3f} to {last:.3f} nats per token, and the reward did not rise with it.",
        "The policy repeats itself. Lower learning_rate, sample at temperature 1, set kl_coef = 0.01, or go back to a step before "
        "the fall (`lockstep steps RUN`).",
    )


def _longer(run: _Run) -> Advice | None:
    first, last = run.first("reply_tokens_mean"), run.last("reply_tokens_mean")
    if not last > 2 * first or run.learned():
        return None
    return Advice(
        "length-growth",
        f"Replies grew from {first:.0f} to {last:.0f} tokens, and the reward did not rise with them.",
        'Give each token the same weight (token_normalization = "token"), set advantage = "dr_grpo", or take a little '
        "off the reward per token.",
    )


def _mismatch(run: _Run) -> Advice | None:
    first, last = run.first("mismatch"), run.last("mismatch")
    if not last > max(2.5 * first, 1e-4):
        return None
    return Advice(
        "mismatch",
        f"Server and trainer differ by {last:.2g} nats per token, {first:.2g} at first.",
        "The policy moves to where the two programs round differently. Lower learning_rate, add importance_correction = "
        '"truncated" with old_logprobs = "trainer", turn on enable_expert_replay for mixtures of experts, or try dtype float32.',
    )


def _idle(run: _Run) -> Advice | None:
    train, beside = run.last("seconds_train"), bool(run.values("wait_for_rollouts"))
    rollout = run.last("wait_for_rollouts" if beside else "seconds_rollout")
    if not (rollout > 4 * train and rollout > 1):
        return None
    return Advice(
        "idle-trainer",
        f"A step waits {rollout:.1f} s for rollouts and trains for {train:.1f} s.",
        "Let rollouts run in parallel (an await on anything slow, max_num_seqs in [backend]), shorten the slowest ones "
        "(rollout_timeout_s), give the server more GPUs than the trainer, or raise groups_per_step.",
    )


def _stale(run: _Run) -> Advice | None:
    dropped, trained = run.last("trajectories_dropped_stale"), run.last("trajectories")
    if not dropped > 0.1 * (dropped + trained):
        return None
    return Advice(
        "stale-queue",
        f"{dropped:.0f} trajectories a step are too old when their turn comes, {trained:.0f} are trained on.",
        "Keep fewer rollouts under way, or raise max_steps_off_policy in [train].",
    )


_RULES: tuple[Callable[[_Run], Advice | None], ...] = (
    *(_rewards_equal, _truncated, _zero_variance, _entropy),
    *(_longer, _mismatch, _idle, _stale),
)


def advice(metrics: Metrics) -> list[Advice]:
    """What is wrong with a run, gravest first; nothing before it has some trained steps."""
    trained = [metrics[step] for step in sorted(metrics) if "loss" in metrics[step]]
    if len(trained) < _FEWEST:
        return []
    run = _Run(trained)
    return [given for rule in _RULES if (given := rule(run)) is not None]
