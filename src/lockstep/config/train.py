"""Settings of a training step."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from lockstep.config.base import Config
from lockstep.errors import ConfigError
from lockstep.losses import find_loss
from lockstep.losses.base import PolicyLoss

_CORRECTION_DEFAULTS: dict[str, tuple[float, float]] = {
    "truncated": (0.0, 2.0),
    "masked": (0.0, 2.0),
    "icepop": (0.5, 5.0),
}


class TrainConfig(Config):
    """One training step: from groups of trajectories to the next version."""

    learning_rate: float = Field(default=1e-5, gt=0, description="AdamW step size, constant within the step")
    loss: str = Field(
        default="cispo",
        description="cispo: clipped importance weight times log-probability; ppo: clipped surrogate per token; gspo: "
        "per sequence; or your own, as module:function (lockstep.losses.base)",
    )
    clip_low: float | None = Field(
        default=None,
        ge=0,
        description="the importance ratio is clipped below 1 - clip_low; None: 1.0 (cispo), 0.2 (ppo), 3e-4 (gspo)",
    )
    clip_high: float | None = Field(
        default=None,
        ge=0,
        description="the importance ratio is clipped above 1 + clip_high; None: 4.0 (cispo), 0.2 (ppo), 4e-4 (gspo)",
    )
    clip_dual: float | None = Field(
        default=None,
        gt=1,
        description="ppo, negative advantages: the loss of a token stops growing at this ratio (arXiv 1912.09729); "
        "None: 3.0 (ppo)",
    )
    kl_coef: float = Field(
        default=0.0, ge=0, description="weight of the KL penalty towards the reference step; 0: none"
    )
    kl_reference_step: int | None = Field(
        default=None, ge=0, description="the step the KL penalty pulls towards; None: step 0. Needs kl_coef > 0"
    )
    advantage_normalization: Literal["std", "none"] = Field(
        default="std",
        description="std: reward minus the group's mean, over the group's standard deviation; none: no division",
    )
    reward_eps: float = Field(
        default=1e-5,
        ge=0,
        lt=1,
        description="rewards of a group that differ by at most this share of its largest |reward| are equal: no signal",
    )
    token_normalization: Literal["token", "sequence"] | None = Field(
        default=None,
        description="token: every trained token counts the same; sequence: every trajectory does; None: token "
        "(cispo, ppo), sequence (gspo)",
    )
    old_logprobs: Literal["sampling", "trainer"] | None = Field(
        default=None,
        description="what the importance ratio divides by: the server's log-probabilities, or the trainer's own "
        "before the step; None: sampling (cispo, ppo), trainer (gspo)",
    )
    importance_correction: Literal["truncated", "masked", "icepop"] | None = Field(
        default=None,
        description="weight trainer/server per token, for what the two compute differently: capped (truncated), zero "
        "above the cap (masked), or zero outside [floor, cap] (icepop). Needs old_logprobs = trainer",
    )
    importance_cap: float | None = Field(
        default=None, gt=0, description="cap of that weight; None: 2.0 (truncated, masked), 5.0 (icepop)"
    )
    importance_floor: float | None = Field(
        default=None, ge=0, description="floor of that weight, icepop only; None: 0.5"
    )
    minibatches: int = Field(default=1, gt=0, description="optimizer steps per batch; its rows are split evenly")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="clip the gradient's global L2 norm; None: never"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.99), description="AdamW moment decays, each in [0, 1)")
    eps: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW decoupled weight decay, of matrices only")
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

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, loss: str) -> str:
        try:
            find_loss(loss)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return loss

    @field_validator("max_dropped")
    @classmethod
    def _count_or_share(cls, limit: int | float) -> int | float:
        if limit > 1 and limit != int(limit):
            raise ValueError("must be a count, or a share below 1")
        return limit

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must each be in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _no_silent_settings(self) -> TrainConfig:
        if self.kl_reference_step is not None and self.kl_coef == 0:
            raise ValueError("kl_reference_step has no effect with kl_coef = 0: set kl_coef, or leave the step out")
        if self.over_length != "error" and self.row_length is None:
            raise ValueError(
                f"over_length = {self.over_length} has no effect without row_length: rows grow to the longest sequence"
            )
        return self

    @model_validator(mode="after")
    def _clips_that_work(self) -> TrainConfig:
        if self.clip_low is not None and self.clip_low > 1:
            raise ValueError(f"clip_low = {self.clip_low} has no effect above 1, ratios are never negative: use 1.0")
        if self.clip_dual is not None:
            if self.policy_loss.dual_clip is None:
                raise ValueError(f"clip_dual has no effect with loss = {self.loss}: leave it out, or set loss = ppo")
            if self.clip_dual <= self.clip_range[1]:
                raise ValueError(
                    f"clip_dual = {self.clip_dual} must be above 1 + clip_high = {self.clip_range[1]:g}: a lower one "
                    "cuts what the clip lets through"
                )
        if self.policy_loss.by_sequence and self.divides_by == "sampling" and None in (self.clip_low, self.clip_high):
            raise ValueError(
                f"loss = {self.loss} with old_logprobs = sampling clips rounding: server and trainer differ by more than the "
                "default clips, 3e-4 and 4e-4. Leave old_logprobs out, or set both clip_low and clip_high"
            )
        return self

    @model_validator(mode="after")
    def _corrections_that_work(self) -> TrainConfig:
        if self.importance_correction is None:
            for name in ("importance_cap", "importance_floor"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect without importance_correction: set it, or leave {name} out")
            if self.max_steps_off_policy > 0 and self.divides_by == "trainer":
                raise ValueError(
                    f"max_steps_off_policy = {self.max_steps_off_policy} with old_logprobs = trainer trains on older "
                    f"rollouts as if they were new (loss = {self.loss}): set importance_correction, or "
                    "old_logprobs = sampling"
                )
        elif self.divides_by != "trainer":
            raise ValueError(
                "importance_correction needs old_logprobs = trainer: with sampling the ratio already divides by "
                "the server's"
            )
        if self.importance_floor is not None and self.importance_correction != "icepop":
            raise ValueError(
                f"importance_floor has no effect with importance_correction = {self.importance_correction}"
            )
        floor, cap = self.importance_bounds
        if floor > cap:
            raise ValueError(f"importance_floor = {floor} is above importance_cap = {cap}: every token would be masked")
        return self

    @property
    def policy_loss(self) -> PolicyLoss:
        return find_loss(self.loss)

    @property
    def divides_by(self) -> Literal["sampling", "trainer"]:
        """`old_logprobs` with the loss's default filled in."""
        return self.old_logprobs or self.policy_loss.old_logprobs

    @property
    def weighs_by(self) -> Literal["token", "sequence"]:
        """`token_normalization` with the loss's default filled in."""
        return self.token_normalization or self.policy_loss.token_normalization

    @property
    def dual_clip(self) -> float:
        """`clip_dual` with the loss's default filled in; inf for a loss without one."""
        default = self.policy_loss.dual_clip
        return self.clip_dual or default or float("inf")

    @property
    def clip_range(self) -> tuple[float, float]:
        """(1 - clip_low, 1 + clip_high) with the loss's defaults filled in."""
        low, high = self.policy_loss.clip
        low = low if self.clip_low is None else self.clip_low
        return 1 - low, 1 + (high if self.clip_high is None else self.clip_high)

    @property
    def importance_bounds(self) -> tuple[float, float]:
        """(floor, cap) of the importance correction with its defaults filled in; (0, inf) without
        one.
        """
        if self.importance_correction is None:
            return 0.0, float("inf")
        floor, cap = _CORRECTION_DEFAULTS[self.importance_correction]
        return (
            floor if self.importance_floor is None else self.importance_floor,
            cap if self.importance_cap is None else self.importance_cap,
        )

    @property
    def reference_step(self) -> int | None:
        """The step the KL penalty pulls towards; None without a penalty."""
        return (self.kl_reference_step or 0) if self.kl_coef > 0 else None
