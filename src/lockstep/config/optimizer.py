"""Settings of the optimizer, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lockstep.config.base import Config
from lockstep.errors import ConfigError


class OptimizerConfig(Config):
    """AdamW and its learning rate, which may follow a schedule over the run's steps.

    The rate depends on the number of the step alone, so that a resumed run goes on as it would have.
    """

    learning_rate: float = Field(
        default=1e-5, gt=0, description="AdamW step size; with a schedule or a warm-up, the highest one"
    )
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="constant",
        description="of the steps after the warm-up; linear, cosine: fall until schedule_steps; wsd: constant, then linear over the "
        "last decay_steps",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="the rate rises linearly over so many steps; the last of them has learning_rate"
    )
    schedule_steps: int | None = Field(
        default=None,
        gt=0,
        description="steps of the schedule, warm-up included; None: as many as the run has after schedule_start ([task] steps)",
    )
    schedule_start: int = Field(
        default=0, ge=0, description="the schedule begins after this step of the run, such as the last one of SFT"
    )
    decay_steps: int | None = Field(default=None, gt=0, description="wsd only: steps over which the rate falls")
    min_lr_ratio: float = Field(
        default=0.0, ge=0, lt=1, description="the rate falls towards this share of learning_rate; not for constant"
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="clip the gradient's global L2 norm; None: never"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.99), description="AdamW moment decays, each in [0, 1)")
    eps: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW decoupled weight decay, of matrices only")

    @field_validator("betas")
    @classmethod
    def _decays(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("must each be in [0, 1)")
        return betas

    @model_validator(mode="after")
    def _schedules_that_work(self) -> Self:
        if self.lr_schedule == "constant":
            for name in ("schedule_steps", "min_lr_ratio"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} has no effect with lr_schedule = constant: choose another, or leave it out"
                    )
            if self.schedule_start and not self.warmup_steps:
                raise ValueError("schedule_start has no effect without a schedule or a warm-up: leave it out")
        if (self.lr_schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError(
                f"decay_steps goes with lr_schedule = wsd (it is {self.lr_schedule}): set both, or neither"
            )
        if self.schedule_steps is not None and self.schedule_steps < self.warmup_steps + (self.decay_steps or 1):
            raise ValueError(
                f"schedule_steps = {self.schedule_steps} leaves no room for warmup_steps = {self.warmup_steps} and the "
                f"{self.decay_steps or 1} steps after"
            )
        return self

    def over(self, steps: int) -> Self:
        """The same with `schedule_steps` filled in for a run of so many steps. Raises ConfigError
        where they are too few.
        """
        if self.lr_schedule == "constant" or self.schedule_steps is not None:
            return self
        settings: dict[str, Any] = self.model_dump(exclude_unset=True)
        settings["schedule_steps"] = max(1, steps - self.schedule_start)
        return type(self)(**settings)

    def at_step(self, step: int) -> Self:
        """The same with the learning rate of the update that makes step `step` of the run.

        Raises ConfigError for a schedule without an end, and for a step beyond its end.
        """
        return self.model_copy(update={"learning_rate": self.learning_rate * self._share(step - self.schedule_start)})

    def _share(self, step: int) -> float:
        """The rate of the schedule's step (the first is 1) as a share of the highest one. Never 0."""
        if step <= self.warmup_steps:
            return max(1, step) / self.warmup_steps if self.warmup_steps else 1.0
        if self.lr_schedule == "constant":
            return 1.0
        total = self.schedule_steps
        if total is None:
            raise ConfigError(f"lr_schedule = {self.lr_schedule} needs schedule_steps outside of `lockstep train`")
        if step > total:
            raise ConfigError(
                f"step {step + self.schedule_start} is beyond the schedule, whose last is {total + self.schedule_start}: "
                "raise schedule_steps"
            )
        if self.decay_steps is not None:
            passed = max(0, step - (total - self.decay_steps)) / (self.decay_steps + 1)
        else:
            passed = (step - self.warmup_steps - 1) / (total - self.warmup_steps)
        falls = (1 + math.cos(math.pi * passed)) / 2 if self.lr_schedule == "cosine" else 1 - passed
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * falls
