"""Settings of supervised steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lockstep.config.optimizer import OptimizerConfig
from lockstep.config.train import TrainConfig


class SFTConfig(OptimizerConfig):
    """One supervised step: from chats to the next version."""

    learning_rate: float = Field(
        default=1e-4, gt=0, description="AdamW step size; with a schedule or a warm-up, the highest one"
    )
    loss_on: Literal["all", "last"] = Field(
        default="all", description="assistant turns that carry loss: all of a chat's, or the last one only"
    )
    skip_bad_rows: bool = Field(
        default=False,
        description="leave out rows that are too long, empty or can't be masked; false: the first of them, by line, end the run",
    )
    minibatches: int = Field(default=1, gt=0, description="optimizer steps per batch; its rows are split evenly")
    row_length: int | None = Field(
        default=None,
        gt=0,
        description="tokens per packed row, and of the longest chat; None: fits the batch, and max_model_len is the longest chat",
    )
    share_prefixes: bool = Field(
        default=True, description="compute tokens that sequences share once (prefix-tree packing)"
    )
    seed: int = Field(default=0, ge=0, description="order of the chats, and of rows and ties in packing")

    def step_config(self) -> TrainConfig:
        """The training step that minimises the mean cross entropy of the tokens with loss: REINFORCE
        with an advantage of 1.
        """
        shared = {name: getattr(self, name) for name in OptimizerConfig.model_fields}
        shared |= {"schedule_steps": None, "lr_schedule": "constant", "warmup_steps": 0}
        shared |= {"schedule_start": 0, "decay_steps": None, "min_lr_ratio": 0.0}
        return TrainConfig(
            **shared, loss="reinforce", old_logprobs="trainer", minibatches=self.minibatches, max_mismatch=None
        )
