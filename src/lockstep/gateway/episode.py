"""An episode: one attempt of an agent, in any process, at an address and with a key of its own."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from lockstep.errors import DataError
from lockstep.gateway.messages import Message
from lockstep.gateway.tree import Fork, Tree
from lockstep.rollouts.trajectory import Trajectory

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice


@dataclass(frozen=True)
class Call:
    """One answered request. asked: the model's name in it. new: the messages that no call before it had."""

    asked: str
    tools: list[dict[str, Any]] | None
    new: list[Message]
    choices: list[Choice]


@dataclass
class Captured:
    """What an episode has so far. `lock` guards all of it: the gateway writes it in a thread of its own."""

    tree: Tree = field(default_factory=Tree)
    calls: list[Call] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Episode:
    """What an agent needs to call the model, and what its calls gave.

    base_url: for OpenAI's clients; it ends in `/v1`. api_key: opens this episode alone, until it ends.
    model: the served version. Whatever name an agent asks for, this version answers.
    reward: finite; `trajectory()` uses it where no other is given.

    Used as a context manager, the episode ends with the block. In a rollout it ends with the rollout at the latest.
    """

    def __init__(self, root_url: str, api_key: str, model: str, captured: Captured, on_end: Callable[[], None]):
        self.base_url = f"{root_url}/v1"
        self.api_key = api_key
        self.model = model
        self.reward: float | None = None
        self._root_url = root_url
        self._captured = captured
        self._on_end = on_end

    def __repr__(self) -> str:
        return f"Episode({self.model}, {len(self._captured.calls)} calls)"  # never the key

    def environment(self) -> dict[str, str]:
        """Variables that point OpenAI's and Anthropic's clients in another process here: `{**os.environ, **these}`."""
        direct = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "", "127.0.0.1"]
        no_proxy = ",".join(name for name in direct if name)
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "OPENAI_MODEL": self.model,
            "ANTHROPIC_BASE_URL": self._root_url,
            "ANTHROPIC_API_KEY": self.api_key,
            "ANTHROPIC_MODEL": self.model,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    @property
    def forks(self) -> Counter[Fork]:
        """How often the agent's history changed: by compaction, edit, sub-agent, and retry."""
        with self._captured.lock:
            return self._captured.tree.forks()

    @property
    def model_names(self) -> Counter[str]:
        """The model names that the agent asked for, and how often."""
        with self._captured.lock:
            return Counter(call.asked for call in self._captured.calls)

    def end(self) -> None:
        """The key opens nothing from now on; replies under way are dropped. Harmless when it has ended."""
        self._on_end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def trajectory(
        self,
        reward: float | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Trajectory:
        """End the episode and give its calls as one trajectory, in their order. Each sampled token is in it once.

        reward: in place of `episode.reward`. metrics, metadata: the trajectory's; `metadata["episode"]` says how the history changed.
        Raises DataError without a reward, without a call, and if a call could not be aligned with those before it.
        """
        self.end()
        reward = self.reward if reward is None else reward
        if reward is None:
            raise DataError("the episode has no reward: set episode.reward, or give trajectory(reward=...)")
        with self._captured.lock:
            calls, errors, unanswered = list(self._captured.calls), self._captured.errors, self._captured.under_way
        if errors:
            raise DataError(errors[0])
        if not calls:
            raise DataError(
                f"the agent called nothing at {self.base_url}: give it episode.base_url and episode.api_key, or episode.environment()"
            )
        account = {
            "calls": len(calls),
            "unanswered": unanswered,
            "forks": dict(self.forks),
            "model_names": dict(self.model_names),
        }
        items = [item for call in calls for item in (*call.new, *call.choices)]
        tools = next((call.tools for call in calls if call.tools), None)
        return Trajectory(
            messages_and_choices=items,
            tools=tools,
            reward=reward,
            metrics=dict(metrics or {}),
            metadata={**(metadata or {}), "episode": account},
        )
