"""Settings of what a training step minimises: advantages, policy loss, KL penalty, entropy bonus and
importance correction.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from lockstep.algorithms.advantages import find_advantage
from lockstep.algorithms.advantages.base import PolicyAdvantage
from lockstep.algorithms.losses import find_loss
from lockstep.algorithms.losses.base import PolicyLoss
from lockstep.config.base import Config
from lockstep.errors import ConfigError

_CORRECTION_DEFAULTS: dict[str, tuple[float, float]] = {
    "truncated": (0.0, 2.0),
    "masked": (0.0, 2.0),
    "icepop": (0.5, 5.0),
    "rejected": (0.5, 2.0),
}
_WITH_FLOOR = ("icepop", "rejected")
_NARROW = 0.01
"""Clips below this cut the rounding between server and trainer."""


class ObjectiveConfig(Config):
    """What a training step minimises."""

    advantage: str = Field(
        default="grpo",
        description="from rewards to advantages; grpo: reward minus the group's mean, over the group's standard deviation; dr_grpo: "
        "no division; rloo: minus the mean of the others; batch_std, reinforce_pp, reinforce_pp_baseline, maxrl: "
        "docs/algorithms.md; or your own, as module:function (lockstep.algorithms.advantages.base)",
    )
    reward_eps: float = Field(
        default=1e-5,
        ge=0,
        lt=1,
        description="rewards of a group that differ by at most this share of its largest |reward| are equal: no signal",
    )
    advantage_per: Literal["trajectory", "turn"] = Field(
        default="trajectory",
        description="trajectory: all its tokens share one advantage; turn: each reply has its own, from what it and later replies "
        "earned (discount), beside all replies of its group",
    )
    discount: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="advantage_per = turn only: a reward counts for the reply before at this share, for the one before that at "
        "its square; 0: each reply's own reward alone",
    )
    loss: str = Field(
        default="cispo",
        description="cispo: clipped importance weight times log-probability; ppo: clipped surrogate per token; gspo: "
        "per sequence; gmpo, reinforce, sapo: docs/algorithms.md; or your own, as module:function (lockstep.algorithms.losses.base)",
    )
    loss_parameters: dict[str, float] = Field(
        default_factory=dict,
        description="further numbers of the loss; sapo: tau_positive (1.0) and tau_negative (1.05)",
    )
    clip_low: float | None = Field(
        default=None,
        ge=0,
        description="the importance ratio is clipped below 1 - clip_low; None: 1.0 (cispo), 0.2 (ppo), 3e-4 (gspo), "
        "1 - exp(-0.4) (gmpo)",
    )
    clip_high: float | None = Field(
        default=None,
        ge=0,
        description="the importance ratio is clipped above 1 + clip_high; None: 4.0 (cispo), 0.2 (ppo), 4e-4 (gspo), "
        "exp(0.4) - 1 (gmpo)",
    )
    clip_dual: float | None = Field(
        default=None,
        gt=1,
        description="ppo, negative advantages: the loss of a token stops growing at this ratio (arXiv 1912.09729); "
        "None: 3.0 (ppo)",
    )
    entropy_coef: float = Field(
        default=0.0,
        ge=0,
        description="weight of the entropy bonus: the loss falls by this times the predictions' entropy; 0: none",
    )
    kl_coef: float = Field(
        default=0.0, ge=0, description="weight of the KL penalty towards the reference step; 0: none"
    )
    kl_reference_step: int | None = Field(
        default=None, ge=0, description="the step the KL penalty pulls towards; None: step 0. Needs kl_coef > 0"
    )
    kl_reference_path: Path | None = Field(
        default=None,
        description="folder of a published step, of any run of the same base model and adapter shape, that the KL penalty pulls "
        "towards instead: the teacher of on-policy distillation (docs/algorithms.md). Needs kl_coef > 0",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="estimate of KL(policy || reference) at a sampled token, with x = log policy - log reference; k1: x; k2: x^2 / 2; "
        "k3: exp(-x) - 1 + x. Needs kl_coef > 0",
    )
    kl_in: Literal["loss", "reward"] = Field(
        default="loss",
        description="loss: the estimate is differentiated; reward: the estimates of a token and the later ones of its sequence are "
        "taken from its advantage, which is not normalised again. Needs kl_coef > 0",
    )
    kl_corrected: bool = Field(
        default=False,
        description="kl_in = loss only: the estimate is weighted by the ratio new/old, so that its gradient is that of the KL "
        "divergence also for tokens of an older policy (arXiv 2512.02556)",
    )
    token_normalization: Literal["token", "sequence", "constant"] | None = Field(
        default=None,
        description="token: every trained token counts the same; sequence: every trajectory does; constant: as token, but the sum "
        "is divided by trajectories x constant_length, whatever their length; None: token (cispo, ppo, reinforce, sapo), "
        "sequence (gspo, gmpo)",
    )
    constant_length: int | None = Field(
        default=None,
        gt=0,
        description="tokens that a trajectory counts as, with token_normalization = constant: the longest reply (Dr. GRPO), or 1 for "
        "the mean of sums",
    )
    old_logprobs: Literal["sampling", "trainer"] | None = Field(
        default=None,
        description="what the importance ratio divides by: the server's log-probabilities, or the trainer's own "
        "before the step; None: trainer (gspo), sampling (all others)",
    )
    importance_correction: Literal["truncated", "masked", "icepop", "rejected"] | None = Field(
        default=None,
        description="weight trainer/server, for what the two compute differently: capped (truncated), zero "
        "above the cap (masked), zero outside [floor, cap] (icepop), or 1 inside and 0 outside (rejected). Needs old_logprobs = "
        "trainer",
    )
    importance_level: Literal["token", "sequence", "geometric"] | None = Field(
        default=None,
        description="whose weight that is; sequence: the product over a sequence's tokens, so that whole sequences are masked or "
        "rejected; geometric: its root by the number of tokens; None: geometric (gspo, gmpo), token (all others)",
    )
    importance_cap: float | None = Field(
        default=None, gt=0, description="cap of that weight; None: 2.0 (truncated, masked, rejected), 5.0 (icepop)"
    )
    importance_floor: float | None = Field(
        default=None, ge=0, description="floor of that weight, icepop and rejected only; None: 0.5"
    )

    @field_validator("loss")
    @classmethod
    def _known_loss(cls, loss: str) -> str:
        try:
            find_loss(loss)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return loss

    @field_validator("advantage")
    @classmethod
    def _known_advantage(cls, advantage: str) -> str:
        try:
            find_advantage(advantage)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return advantage

    @model_validator(mode="after")
    def _penalties_that_work(self) -> ObjectiveConfig:
        if self.kl_coef == 0:
            for name in ("kl_reference_step", "kl_reference_path", "kl_estimator", "kl_in", "kl_corrected"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect with kl_coef = 0: set kl_coef, or leave {name} out")
        if self.kl_reference_step is not None and self.kl_reference_path is not None:
            raise ValueError("kl_reference_step and kl_reference_path both name the reference: leave one out")
        if self.kl_in == "reward" and self.kl_corrected:
            raise ValueError("kl_corrected has no effect with kl_in = reward: the loss corrects its advantages itself")
        if self.kl_coef > 0 and self.kl_estimator == "k1" and self.kl_in == "loss" and not self.kl_corrected:
            raise ValueError(
                "kl_estimator = k1 with kl_in = loss has a gradient of mean zero, and so no effect: set kl_in = reward, "
                "kl_corrected = true, or another estimator"
            )
        return self

    @model_validator(mode="after")
    def _parameters_that_exist(self) -> ObjectiveConfig:
        known = self.policy_loss.parameters
        for name in self.loss_parameters:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(f"loss_parameters: loss = {self.loss} has no parameter {name!r}: {has}")
        if (self.weighs_by == "constant") != (self.constant_length is not None):
            raise ValueError(
                "constant_length goes with token_normalization = constant: set both, or neither (constant_length = "
                f"{self.constant_length}, token_normalization = {self.weighs_by})"
            )
        return self

    @model_validator(mode="after")
    def _turns_that_work(self) -> ObjectiveConfig:
        if self.discount != 1 and self.advantage_per != "turn":
            raise ValueError(
                f"discount = {self.discount} has no effect with advantage_per = {self.advantage_per}: set turn"
            )
        return self

    @model_validator(mode="after")
    def _clips_that_work(self) -> ObjectiveConfig:
        if self.policy_loss.clip is None:
            for name in ("clip_low", "clip_high"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect with loss = {self.loss}, which does not clip: leave it out")
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
        narrow = max(self.policy_loss.clip or (math.inf,)) < _NARROW
        if narrow and self.divides_by == "sampling" and None in (self.clip_low, self.clip_high):
            raise ValueError(
                f"loss = {self.loss} with old_logprobs = sampling clips rounding: server and trainer differ by more than the "
                "default clips, 3e-4 and 4e-4. Leave old_logprobs out, or set both clip_low and clip_high"
            )
        return self

    @model_validator(mode="after")
    def _corrections_that_work(self) -> ObjectiveConfig:
        if self.importance_correction is None:
            for name in ("importance_cap", "importance_floor", "importance_level"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect without importance_correction: set it, or leave {name} out")
        elif self.divides_by != "trainer":
            raise ValueError(
                "importance_correction needs old_logprobs = trainer: with sampling the ratio already divides by "
                "the server's"
            )
        if self.importance_floor is not None and self.importance_correction not in _WITH_FLOOR:
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
    def policy_advantage(self) -> PolicyAdvantage:
        return find_advantage(self.advantage)

    @property
    def divides_by(self) -> Literal["sampling", "trainer"]:
        """`old_logprobs` with the loss's default filled in."""
        return self.old_logprobs or self.policy_loss.old_logprobs

    @property
    def weighs_by(self) -> Literal["token", "sequence", "constant"]:
        """`token_normalization` with the loss's default filled in."""
        return self.token_normalization or self.policy_loss.token_normalization

    @property
    def corrects_by(self) -> Literal["token", "sequence", "geometric"]:
        """`importance_level` with the loss's default filled in."""
        return self.importance_level or ("geometric" if self.policy_loss.by_sequence else "token")

    @property
    def dual_clip(self) -> float:
        """`clip_dual` with the loss's default filled in; inf for a loss without one."""
        default = self.policy_loss.dual_clip
        return self.clip_dual or default or float("inf")

    @property
    def clip_range(self) -> tuple[float, float]:
        """(1 - clip_low, 1 + clip_high) with the loss's defaults filled in; (0, inf) for a loss
        that does not clip.
        """
        low, high = self.policy_loss.clip or (1.0, float("inf"))
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
        """The run's own step that the KL penalty pulls towards; None without one."""
        return (self.kl_reference_step or 0) if self.kl_coef > 0 and self.kl_reference_path is None else None

    @property
    def trains_without_signal(self) -> bool:
        """Whether a sequence without an advantage has a gradient."""
        return self.kl_coef > 0 or self.entropy_coef > 0
