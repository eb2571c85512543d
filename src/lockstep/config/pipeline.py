"""Settings of the asynchronous loop: how far rollouts may run ahead of the trainer."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from lockstep.config.base import Config
from lockstep.errors import ConfigError


class PipelineConfig(Config):
    """Rollouts go on while the trainer works, as far as `max_steps_off_policy` allows."""

    max_concurrent: int | None = Field(
        default=None,
        gt=0,
        description="rollouts at once, at most; None: as many as the server takes at once, 64 where it does not say",
    )
    least_concurrent: int | None = Field(
        default=None,
        gt=0,
        description="rollouts at once, at least. In between, their number grows while the server's KV cache has room, and falls "
        "when it is full or requests are preempted; None: a group's. The same as max_concurrent: always this many",
    )
    queue_groups: int | None = Field(
        default=None,
        ge=0,
        description="groups that may be under way or ready beyond the step that is made now; None: what window leaves of "
        "max_steps_off_policy x groups_per_step. More than that: some groups become too old, and are dropped",
    )
    window: int | None = Field(
        default=None,
        ge=0,
        description="groups begun later that may be trained before a slow one; 0: strictly in order; "
        "None: half of max_steps_off_policy x groups_per_step",
    )

    @model_validator(mode="after")
    def _least_below_most(self) -> PipelineConfig:
        if (self.least_concurrent or 0) > (self.max_concurrent or math.inf):
            raise ValueError(
                f"least_concurrent = {self.least_concurrent} is above max_concurrent = {self.max_concurrent}"
            )
        return self

    def limits(self, max_steps_off_policy: int, groups_per_step: int) -> tuple[int, int]:
        """(queue_groups, window) with the defaults filled in.

        A group waits for at most `queue_groups + window` others, which is `max_steps_off_policy`
        steps: with the defaults no group becomes too old.

        Raises ConfigError for a queue in which every group would become too old.
        """
        most = max_steps_off_policy * groups_per_step
        if self.queue_groups is not None and self.queue_groups > most:
            raise ConfigError(
                f"queue_groups = {self.queue_groups}: the last of them would be older than max_steps_off_policy = "
                f"{max_steps_off_policy} allows: use at most {most} (max_steps_off_policy x groups_per_step)"
            )
        window = self.window
        if window is None:
            window = most // 2 if self.queue_groups is None else most - self.queue_groups
        ahead = max(0, most - window) if self.queue_groups is None else self.queue_groups
        return ahead, window

    def resolved(self, max_steps_off_policy: int, groups_per_step: int) -> PipelineConfig:
        """The same settings with `limits` filled in."""
        ahead, window = self.limits(max_steps_off_policy, groups_per_step)
        fields = self.model_dump() | {"queue_groups": ahead, "window": window}
        return PipelineConfig.model_construct(_fields_set=self.model_fields_set, **fields)
