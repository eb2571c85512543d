"""Settings of a training step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lockstep.config.objective import ObjectiveConfig
from lockstep.config.optimizer import OptimizerConfig


class TrainConfig(ObjectiveConfig, OptimizerConfig):
    """One training step: from groups of trajectories to the next version."""

    minibatches: int = Field(default=1, gt=0, description="optimizer steps per batch; its rows are split evenly")
    epochs: int = Field(
        default=1,
        gt=0,
        description="passes over the batch: the optimizer makes minibatches x epochs steps. The ratio divides by the policy before the "
        "first of them",
    )
    row_length: int | None = Field(
        default=None,
        gt=0,
        description="tokens per packed row; None: fits the batch (its longest sequence, or 4096 if there are that many tokens, and "
        "more where shared prompts would be computed twice and the trainer's memory carries longer rows)",
    )
    share_prefixes: bool = Field(
        default=True, description="compute tokens that sequences share once (prefix-tree packing)"
    )
    over_length: Literal["error", "truncate", "drop"] = Field(
        default="error",
        description="what to do with a sequence longer than row_length; error: leave its trajectory out, within max_dropped",
    )
    overlong_tokens: int | None = Field(
        default=None,
        gt=0,
        description="a trajectory with so many sampled tokens loses all of overlong_penalty from its reward (soft overlong punishment, "
        "arXiv 2503.14476); None: none does",
    )
    overlong_buffer: int | None = Field(
        default=None,
        gt=0,
        description="over so many tokens before overlong_tokens the loss of reward grows linearly from nothing",
    )
    overlong_penalty: float = Field(
        default=1.0, gt=0, description="reward that a trajectory of overlong_tokens loses. Needs overlong_tokens"
    )
    mask_truncated: bool = Field(
        default=False,
        description="a trajectory with a reply that a limit of tokens cut off counts in its group's baseline, and isn't trained on",
    )
    max_steps_off_policy: int = Field(
        default=0,
        ge=0,
        description="rollouts sampled more than this many steps before the current one are left out, within max_dropped",
    )
    max_dropped: int | float = Field(
        default=0.1,
        ge=0,
        description="trajectories of a step that may be left out because they can't be trained on (stale, too long, nothing "
        "sampled, sampling settings, reward or metric): a count, or a share below 1, rounded up",
    )
    max_mismatch: float | None = Field(
        default=0.2,
        gt=0,
        description="refuse the step if the mean |log-probability difference| between server and trainer exceeds "
        "this, in nats; tokens that an earlier step sampled don't count, since the policy has changed under them; "
        "None: never",
    )
    max_token_mismatch: float | None = Field(
        default=None,
        gt=0,
        description="refuse the step if the |log-probability difference| of any one of these tokens exceeds this, in "
        "nats, and the rounding of an fp32 log-probability of its size; None: never",
    )
    seed: int = Field(default=0, ge=0, description="order of rows and ties in packing")

    @field_validator("max_dropped")
    @classmethod
    def _count_or_share(cls, limit: int | float) -> int | float:
        if limit > 1 and limit != int(limit):
            raise ValueError("must be a count, or a share below 1")
        return limit

    @model_validator(mode="after")
    def _no_silent_settings(self) -> TrainConfig:
        if self.over_length != "error" and self.row_length is None:
            raise ValueError(
                f"over_length = {self.over_length} has no effect without row_length: rows grow to the longest sequence"
            )
        if (self.overlong_tokens is None) != (self.overlong_buffer is None):
            raise ValueError("overlong_tokens and overlong_buffer go together: set both, or neither")
        if self.overlong_tokens is None and self.overlong_penalty != 1.0:
            raise ValueError("overlong_penalty has no effect without overlong_tokens: set it, or leave the penalty out")
        if self.overlong_buffer is not None and self.overlong_buffer > (self.overlong_tokens or 0):
            raise ValueError(
                f"overlong_buffer = {self.overlong_buffer} is more than overlong_tokens = {self.overlong_tokens}"
            )
        if self.epochs > 1 and self.loss == "reinforce":
            raise ValueError(
                f"epochs = {self.epochs} with loss = reinforce trains on an older policy's tokens as if they were new: use a loss "
                "with a ratio, such as ppo"
            )
        old_as_new = self.max_steps_off_policy > 0 and self.divides_by == "trainer"
        if old_as_new and self.importance_correction is None:
            raise ValueError(
                f"max_steps_off_policy = {self.max_steps_off_policy} with old_logprobs = trainer trains on older "
                f"rollouts as if they were new (loss = {self.loss}): set importance_correction, or "
                "old_logprobs = sampling"
            )
        return self
