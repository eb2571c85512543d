"""The result of a rollout: conversations with the server's own choices, a reward, and groups of
them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, field_serializer, field_validator

from lockstep.errors import DataError

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice


def is_choice(value: object) -> bool:
    """True for a choice of an OpenAI chat completion. Does not import openai, which is slow."""
    module = sys.modules.get("openai.types.chat.chat_completion")  # no Choice exists before it was imported
    return module is not None and isinstance(value, module.Choice)


def _as_item(value: object) -> Any:
    """A message dict or a Choice, as it is; a serialised Choice becomes one again."""
    if is_choice(value):
        return value
    if not isinstance(value, Mapping):
        raise DataError(
            f"messages_and_choices holds a {type(value).__name__}: give message dicts and the choices of the "
            "server's replies"
        )
    if "message" in value and "finish_reason" in value:
        from openai.types.chat.chat_completion import Choice

        return Choice.model_validate(value)
    if "role" not in value:
        raise DataError(
            f"messages_and_choices holds a dict without a role (keys: {', '.join(map(str, value)) or 'none'})"
        )
    return dict(value)


def _without_numpy(value: object) -> Any:
    """The same value with NumPy's scalars as Python's, wherever they lie in it."""
    numpy = sys.modules.get("numpy")  # no scalar of its exists before it was imported
    if numpy is not None and isinstance(value, numpy.generic):
        return cast(Any, value).item()
    if isinstance(value, Mapping):
        return {name: _without_numpy(item) for name, item in value.items()}
    return [_without_numpy(item) for item in value] if isinstance(value, (list, tuple)) else value


Metadata = Annotated[dict[str, JsonValue], BeforeValidator(_without_numpy)]


class Trajectory(BaseModel):
    """One attempt at a task.

    messages_and_choices: the conversation in order. Dicts are context; `Choice` objects, exactly as
        the server's reply holds them, are what was sampled, and are trained on. They carry token
        ids, log-probabilities and the weight version; nothing is tokenized again.
    tools: the tools the model was offered.
    reward: finite.
    turn_rewards: finite, one for each choice, for `advantage_per = "turn"`; None: the last choice
        earned the reward. Rewards of turns count there alone: `reward` is what is compared elsewhere.
    metrics: numbers to average over the step.
    metadata: anything JSON.

    Raises DataError for a reward that is NaN or infinite, also when it is assigned later.
    """

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, arbitrary_types_allowed=True, ser_json_inf_nan="constants"
    )

    messages_and_choices: list[Any]
    tools: list[dict[str, Any]] | None = None
    reward: float
    turn_rewards: list[float] | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    metadata: Metadata = Field(default_factory=dict)

    @field_validator("messages_and_choices")
    @classmethod
    def _items(cls, items: list[Any]) -> list[Any]:
        return [_as_item(item) for item in items]

    @field_validator("reward", "turn_rewards", "metrics", mode="before")
    @classmethod
    def _no_text(cls, value: object) -> object:
        numbers = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, str):
                raise DataError(f"{number!r} is a text: rewards and metrics must be numbers")
        return value

    @field_validator("reward")
    @classmethod
    def _finite(cls, reward: float) -> float:
        if not math.isfinite(reward):
            raise DataError(
                f"reward is {reward}: a trajectory needs a finite reward, raise an error if the attempt failed"
            )
        return reward

    @field_validator("turn_rewards")
    @classmethod
    def _finite_turns(cls, rewards: list[float] | None) -> list[float] | None:
        for number, reward in enumerate(rewards or []):
            if not math.isfinite(reward):
                raise DataError(f"turn_rewards[{number}] is {reward}: give a finite number")
        return rewards

    @field_serializer("messages_and_choices")
    def _dump_items(self, items: list[Any]) -> list[dict[str, Any]]:
        return [item.model_dump(mode="json", exclude_unset=True) if is_choice(item) else item for item in items]

    @property
    def choices(self) -> list[Choice]:
        """The model's sampled choices, in order. Raises DataError for an item, appended since, that
        is no message and no choice.
        """
        return [item for item in map(_as_item, self.messages_and_choices) if is_choice(item)]

    def rewards_by_turn(self) -> list[float]:
        """One for each choice. Raises DataError if `turn_rewards` has another number of them."""
        count = len(self.choices)
        if self.turn_rewards is None:
            return [0.0] * (count - 1) + [self.reward]
        if len(self.turn_rewards) != count:
            raise DataError(f"turn_rewards has {len(self.turn_rewards)} numbers for {count} choices: give one for each")
        return list(self.turn_rewards)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as plain OpenAI messages, choices turned into assistant messages. Raises
        DataError as `choices` does.
        """
        return [
            item.message.model_dump(mode="json", exclude_none=True) if is_choice(item) else item
            for item in map(_as_item, self.messages_and_choices)
        ]


class RolloutFailure(BaseModel):
    """A rollout that raised: the exception's type and message, the last frames in the user's own
    files, and its traceback as text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    message: str
    where: str = ""
    traceback: str = ""


class TrajectoryGroup(BaseModel):
    """Attempts at the same task; their rewards are compared with each other.

    `exceptions`: attempts that failed.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    trajectories: list[Trajectory]
    exceptions: list[RolloutFailure] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=dict)
