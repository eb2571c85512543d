"""An episode: one attempt of an agent, in any process, at an address and with a key of its own."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    """One answered request, a node of the episode's tree.

    number: in the order of the replies. continues: the call whose reply it continues; None begins a conversation.
    asked: the model's name in it. new: the messages that no call before it had. choices: what was sampled.
    """

    number: int
    continues: int | None
    asked: str
    tools: list[dict[str, Any]] | None
    new: list[Message]
    choices: list[Choice]


CallRewards = Sequence[float] | Callable[[list[Call]], Sequence[float]]
"""One for each call, or a function that gives them, from all calls in their order."""


@dataclass
class Captured:
    """What an episode has so far. `lock` guards all of it: the gateway writes it in a thread of its own."""

    tree: Tree = field(default_factory=Tree)
    calls: list[Call] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    under_way: int = 0
    elsewhere: Counter[str] = field(default_factory=Counter)
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

    @property
    def calls(self) -> list[Call]:
        """What was sampled so far: the calls, each with the number of the call that it continues."""
        with self._captured.lock:
            return list(self._captured.calls)

    def trajectory(
        self,
        reward: float | None = None,
        *,
        rewards: CallRewards | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Trajectory:
        """End the episode and give its calls as one trajectory, in their order. Each sampled token is in it once.

        reward: in place of `episode.reward`. Where only `rewards` are given, it is their sum.
        rewards: one for each call, or a function over `episode.calls` that gives them, for `advantage_per = "turn"`.
        metrics, metadata: the trajectory's; `metadata["episode"]` says how the history changed.

        Raises DataError without a reward, without a call, for another number of rewards than calls, and if a call could not be
        aligned with those before it.
        """
        self.end()
        reward = self.reward if reward is None else reward
        if reward is None and rewards is None:
            raise DataError("the episode has no reward: set episode.reward, or give trajectory(reward=...)")
        with self._captured.lock:
            calls, errors = list(self._captured.calls), self._captured.errors
        if errors:
            raise DataError(errors[0])
        if not calls:
            raise DataError(
                f"the agent called nothing at {self.base_url}: give it episode.base_url and episode.api_key, or episode.environment()"
            )
        by_call = _rewards(rewards, calls)
        return Trajectory(
            messages_and_choices=[item for call in calls for item in (*call.new, *call.choices)],
            tools=next((call.tools for call in calls if call.tools), None),
            reward=sum(by_call or []) if reward is None else reward,
            turn_rewards=None if by_call is None else [by_call[call.number] for call in calls for _ in call.choices],
            metrics=dict(metrics or {}),
            metadata={**(metadata or {}), "episode": self._account()},
        )

    def _account(self) -> dict[str, Any]:
        forks, names, captured = dict(self.forks), dict(self.model_names), self._captured
        with captured.lock:
            account = {
                "calls": len(captured.calls),
                "unanswered": captured.under_way,
                "forks": forks,
                "model_names": names,
            }
            return account | ({"elsewhere": dict(captured.elsewhere)} if captured.elsewhere else {})


def _rewards(given: CallRewards | None, calls: list[Call]) -> list[float] | None:
    if given is None:
        return None
    rewards = list(given(calls)) if callable(given) else list(given)
    if len(rewards) != len(calls):
        raise DataError(
            f"rewards has {len(rewards)} numbers for {len(calls)} calls: give one for each of episode.calls"
        )
    return rewards
