"""Every metric that a training step records: its unit, its section, and what it says. The reference
page is made from this table.

A user's own metrics (`Trajectory.metrics`) are recorded as `rollout/NAME`, the mean over the
trajectories that have them.
"""

from __future__ import annotations

from dataclasses import dataclass

SECTIONS = {
    "evaluation": "What the step answers at temperature 0",
    "rollouts": "What was sampled",
    "batch": "What is trained on, and how it is packed",
    "loss": "The step",
    "mismatch": "Server against trainer, over what the trained step sampled",
    "verification": "The new version in the server",
    "pipeline": "The asynchronous loop (mode = pipeline)",
    "time": "Where the seconds went",
    "memory": "Memory",
}


@dataclass(frozen=True)
class Metric:
    """unit: of the value.
    says: what it is, and what to do about it where that is known.
    """

    unit: str
    section: str
    says: str


def _of(section: str, **metrics: tuple[str, str]) -> dict[str, Metric]:
    return {name: Metric(unit, section, says) for name, (unit, says) in metrics.items()}


EARLIER = {
    "picks_differ": "expert_choices_differ",
    "routes_differ_between_turns": "routed_experts_differ_between_turns",
    "routes_differ_between_siblings": "routed_experts_differ_between_siblings",
}
"""Names that runs of earlier versions have recorded, and today's. A renamed metric keeps its
meaning.
"""

METRICS: dict[str, Metric] = {
    **_of(
        "evaluation",
        greedy_reward=("reward", "Mean over the evaluation's scenarios."),
        greedy_reward_low=("reward", "Lower end of its 95% interval, by bootstrap over the scenarios."),
        greedy_reward_high=("reward", "The upper end."),
        sampled_reward=("reward", "Mean over scenarios and sampled tries, with evaluate_samples."),
        sampled_reward_low=("reward", "Lower end of its 95% interval."),
        sampled_reward_high=("reward", "The upper end."),
        pass_at_K=(
            "share",
            "Chance that one of K sampled tries reaches pass_reward, for K = 1, 2, 4, ...; with `_low` and `_high` as above.",
        ),
        greedy_rollouts_failed=(
            "count",
            "Rollouts of the evaluation that raised, as far as max_exceptions tolerates them.",
        ),
    ),
    **_of(
        "rollouts",
        reward=("reward", "Mean over the trajectories of the step."),
        reward_std=("reward", "Standard deviation over the same."),
        groups=("count", "Groups that are trained on."),
        groups_skipped=("count", "Groups that hold too few trajectories to compare."),
        groups_without_signal=(
            "count",
            "Groups whose rewards are all equal: they teach nothing. Many: the task is too easy or too hard.",
        ),
        groups_left_out=(
            "count",
            "Groups with equal rewards that were replaced, or drawn in vain, with refill_groups: sampled, not trained on.",
        ),
        trajectories=("count", "Trajectories that are trained on."),
        trajectories_dropped=(
            "count",
            "Trajectories that can't be trained on, as far as max_dropped tolerates them; a warning names each.",
        ),
        trajectories_dropped_metric=("count", "Of those: a metric is no finite number."),
        trajectories_dropped_nothing_sampled=("count", "Of those: no choice, or none with a token."),
        trajectories_dropped_reward=("count", "Of those: the reward is no usable number."),
        trajectories_dropped_sampling=("count", "Of those: sampled with settings that can't be trained on."),
        trajectories_dropped_stale=("count", "Of those: older than max_steps_off_policy."),
        trajectories_dropped_too_long=("count", "Of those: longer than row_length, with over_length = error."),
        rollouts_failed=("count", "Rollouts that raised, as far as max_exceptions tolerates them."),
        turns_split=(
            "count",
            "Turns that did not continue an earlier one: the chat template rewrote the conversation.",
        ),
        reply_tokens_mean=("tokens", "Mean length of a reply: the sampled tokens of a turn."),
        reply_tokens_max=("tokens", "The longest."),
        replies_truncated=(
            "share",
            "Replies that a limit of tokens cut off. High: raise max_tokens or max_model_len, or set mask_truncated.",
        ),
        overlong_penalty=(
            "reward",
            "Mean of what trajectories lost for their length (overlong_tokens); reward is before.",
        ),
        turns_mean=("count", "Mean number of replies in a trajectory."),
        trajectories_masked=("count", "Trajectories with a truncated reply, with mask_truncated: not trained on."),
        tokens_sampled=("tokens", "Sampled tokens that carry loss."),
        steps_off_policy=("steps", "Age of the oldest rollout."),
        routed_experts_differ_between_turns=("tokens", "Tokens for which two turns recorded different experts."),
        routed_experts_differ_between_siblings=(
            "share",
            "Shared-prefix tokens for which siblings recorded different experts.",
        ),
    ),
    **_of(
        "batch",
        chats=("count", "Chats of a supervised step."),
        rows=("count", "Packed rows."),
        row_length=("tokens", "Length of a row."),
        sequences=("count", "Sequences in the rows."),
        sequences_dropped=("count", "Sequences longer than row_length, with over_length = drop."),
        sequences_truncated=("count", "The same, with over_length = truncate."),
        sequences_not_computed=("count", "Sequences of groups without signal, which are left out."),
        tokens=("tokens", "Tokens in the rows, padding not counted."),
        tokens_computed=("tokens", "The same: what is computed, shared prefixes once."),
        tokens_unpacked=("tokens", "Tokens of all sequences, shared prefixes as often as they occur."),
        tokens_scored=("tokens", "Tokens that carry loss, shared ones once."),
        shared_share=("share", "Tokens that need not be computed, since sequences share them."),
        padding_share=("share", "Padding in the rows. High: rows are much longer than what fills them."),
    ),
    **_of(
        "loss",
        loss=(
            "loss",
            "Policy loss, KL penalty in the loss and entropy bonus, over what the step's loss is divided by.",
        ),
        loss_policy=("loss", "The policy loss alone."),
        kl_reference=("nats", "Estimate of the KL divergence from the reference step (kl_estimator), before kl_coef."),
        entropy=("nats/token", "Entropy of the predictions. Near 0: the policy has stopped exploring."),
        clip_fraction=(
            "share",
            "Pairs whose weight or gradient was clipped (sapo: halved). Above a few percent on policy: the clip cuts noise.",
        ),
        ratio_mean=("ratio", "Mean of new over old probability."),
        ratio_max=("ratio", "The largest."),
        importance_mean=("weight", "Mean importance correction trainer over server."),
        importance_zeroed=("share", "Pairs that the correction masks or rejects."),
        learning_rate=("rate", "Of the step's updates, by the schedule."),
        grad_norm=("norm", "Global L2 norm of the gradient, before clipping; the mean over the updates."),
        no_signal=("0 or 1", "1: no update was made, since nothing had an advantage."),
        updates=("count", "Optimizer steps since step 0."),
        updates_skipped=("count", "Updates of this step that had no signal, in all epochs."),
    ),
    **_of(
        "mismatch",
        mismatch=(
            "nats/token",
            "Mean |log-probability difference|. It is bf16 rounding, 0.01 to 0.04, if all is right; max_mismatch refuses more.",
        ),
        mismatch_pct=("%", "The same over the mean |log-probability|."),
        mismatch_max=("nats", "The largest difference on a token."),
        mismatch_kl=("nats/token", "KL(sampling policy || trained policy), k3 estimate."),
        kl=("nats/token", "The same over all tokens, older ones too, where the policy itself has moved."),
        ess=("share", "Effective sample size of the weights trainer over server; 1: on policy."),
        rollout_top1_overlap=(
            "share",
            "The server's most likely tokens that are also the trainer's, where rollouts bring them.",
        ),
        rollout_top20_overlap=("share", "The same of the 20 most likely."),
        expert_choices_differ=("share", "Replayed expert choices that the trainer's router would not have made."),
    ),
    **_of(
        "verification",
        verified_identity=("0 or 1", "1: the live memory was read back and is what was sent."),
        verification_power=(
            "ratio",
            "How far the step moved the policy on the probe, in units of the noise. Below 1, only digests tell the steps apart.",
        ),
        probe=("nats/token", "Mean |difference| between server and trainer on the probe."),
        probe_p99=("nats", "Its 99th percentile."),
        probe_noise=("nats/token", "The same mean on the base weights, measured at registration."),
        probe_ratio=(
            "ratio",
            "The difference by the tokens' surprisal, in units of the noise; more than 5 is refused.",
        ),
        top1_overlap=("share", "The trainer's most likely tokens on the probe that are also the server's."),
        top20_overlap=("share", "The same of the 20 most likely."),
        sync_bytes=("bytes", "Weights that travelled."),
        trainer_restarts=("count", "Trainers that were lost in this step and started again."),
        server_restarts=("count", "Servers that were lost in this step and started again."),
    ),
    **_of(
        "pipeline",
        wait_for_rollouts=("s", "The trainer waited for the step's groups. High: the server is too slow."),
        wait_for_slow_groups=(
            "s",
            "Places for rollouts were free, and the queue was full of groups under way. High: raise max_steps_off_policy.",
        ),
        wait_for_trainer=("s", "Places for rollouts were free, and the queue was full of groups that are ready."),
        groups_ready=("count", "Groups that wait in the queue when the step's groups are taken."),
        groups_overtaken=("count", "Mean number of groups drawn later, and trained before; by group of the step."),
        groups_stale=("count", "Groups dropped since the step before, too old to train on; drawn again."),
        groups_failed=("count", "Groups left with fewer than two trajectories by failed rollouts; drawn again."),
        duration_bias=(
            "ratio",
            "Mean duration of the groups trained so far, over that of all that left the queue. Below 1: slow ones are dropped.",
        ),
        rollouts_under_way=("count", "Rollouts that run, or wait for a place, when the step's groups are taken."),
        rollouts_at_once=("count", "Places for rollouts, at the step's end."),
        kv_use=("share", "The largest use of the server's KV cache that was seen during the step."),
        preemptions=("count", "Requests that the server put off during the step, since its KV cache was full."),
    ),
    **_of(
        "time",
        seconds_rollout=("s", "The rollouts of the step, from the first request to the last reward."),
        seconds_train=("s", "`train` from its call until the weights leave: packing, scoring the probe, the updates."),
        seconds_prepare=("s", "Rows to the device."),
        seconds_old_logprobs=("s", "The forward pass before the first update, where several updates need it."),
        seconds_reference=("s", "The forward pass of the KL reference."),
        seconds_forward_backward=("s", "Forward and backward passes."),
        seconds_optimizer=("s", "Gradient sums and optimizer steps."),
        seconds_compile=("s", "Compiling, inside the others. Above 1 after the first step: report it."),
        compilations=("count", "Programs that torch compiled."),
        seconds_sync=("s", "The weights into the server."),
        seconds_sync_transfer=("s", "Of that, until the last byte left."),
        seconds_sync_pause=("s", "Of that, generation stood still."),
        seconds_verify=("s", "The verification after the sync."),
        seconds_publish=("s", "The checkpoint on disk."),
        tokens_per_second=("tokens/s", "Tokens computed by the second of forward and backward pass."),
    ),
    **_of(
        "memory",
        peak_memory_bytes=("bytes", "Largest allocation of the trainer's device in this step, of rank 0."),
        layers_recomputed=("count", "Layers whose activations are computed again in the backward pass."),
    ),
}

USERS = "rollout/"
"""The prefix of a user's own metrics."""
PASS_AT = "pass_at_"
"""The prefix of pass@k, by k, and of the ends of its interval (`pass_at_4_low`)."""


def tag(name: str) -> str:
    """`SECTION/NAME`, which viewers group their charts by. A user's own metric has its section."""
    metric = METRICS.get(name)
    return f"{metric.section}/{name}" if metric else name


def is_known(name: str) -> bool:
    return name in METRICS or name.startswith((USERS, PASS_AT))
