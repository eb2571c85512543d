"""Rewards of a group from another model, which sees its attempts beside each other."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import ConfigError
from lockstep.rollouts.failures import failure_of
from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup, is_choice

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RUBRIC = "Judge how well each attempt does what was asked. A better attempt gets a higher score; equal attempts get equal scores."
_FORM = 'Answer with a JSON object alone: {{"scores": [...]}}, one number from 0 to 1 for each of the {count} attempts, in their order.'


class JudgementError(Exception):
    """The judge did not give one score from 0 to 1 for each attempt."""


class Judge:
    """Scores the attempts of a group with any OpenAI-compatible model, for `gather_trajectory_groups(after_each=judge.rank)`.

    client, model: who judges.
    rubric: what makes an attempt good.
    cache: a folder for judgements; a group of the same attempts is judged once. None: every group is judged.
    tries: how often the judge is asked, if its answer is no judgement.
    """

    def __init__(
        self, client: AsyncOpenAI, model: str, *, rubric: str = RUBRIC, cache: Path | None = None, tries: int = 3
    ):
        if tries < 1:
            raise ConfigError(f"tries = {tries}: a judge must be asked at least once")
        self.client, self.model, self.rubric, self.cache, self.tries = client, model, rubric, cache, tries

    async def rank(self, group: TrajectoryGroup) -> TrajectoryGroup:
        """The group with the judge's scores, from 0 to 1, as rewards. A group of one, or of none, comes back as it is.

        Each trajectory's metrics have its share of the tokens that the judgement cost. If the judgement fails, every
        attempt of the group is a failed rollout: no reward is made up.
        """
        if len(group.trajectories) < 2:
            return group
        try:
            scores, tokens = await self._judged(group)
        except Exception as error:  # noqa: BLE001  a server of somebody else's may fail in any way
            failed = [failure_of(error)] * len(group.trajectories)
            return TrajectoryGroup(trajectories=[], exceptions=[*group.exceptions, *failed], metadata=group.metadata)
        share = tokens / len(scores)
        ranked = [
            each.model_copy(update={"reward": score, "metrics": {**each.metrics, "judge_tokens": share}})
            for each, score in zip(group.trajectories, scores, strict=True)
        ]
        return TrajectoryGroup(trajectories=ranked, exceptions=group.exceptions, metadata=group.metadata)

    async def _judged(self, group: TrajectoryGroup) -> tuple[list[float], int]:
        """Scores in the group's order, and the tokens they cost."""
        asked, attempts = _shown(group.trajectories)
        content = json.dumps([self.model, self.rubric, asked, sorted(attempts)], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()
        kept = None if self.cache is None else self.cache / f"{digest}.json"
        if kept is not None and kept.is_file():
            known = json.loads(kept.read_text())
            return [known[attempt] for attempt in attempts], 0
        # A judge may prefer a place: the order follows from the content, so that a repetition asks the same.
        order = random.Random(digest).sample(range(len(attempts)), len(attempts))
        given, tokens = await self._ask(asked, [attempts[position] for position in order])
        scores = [0.0] * len(attempts)
        for position, score in zip(order, given, strict=True):
            scores[position] = score
        by_attempt = _same_for_equals(attempts, scores)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            written = kept.with_suffix(f".{random.getrandbits(32):08x}")
            written.write_text(json.dumps(by_attempt))
            written.rename(kept)
        return [by_attempt[attempt] for attempt in attempts], tokens

    async def _ask(self, asked: str, attempts: Sequence[str]) -> tuple[list[float], int]:
        parts = [f'<attempt number="{number}">\n{text}\n</attempt>' for number, text in enumerate(attempts, 1)]
        form = _FORM.format(count=len(attempts))
        messages: list[Any] = [
            {"role": "system", "content": f"{self.rubric}\n\n{form}"},
            {"role": "user", "content": f"<asked>\n{asked}\n</asked>\n\n" + "\n".join(parts)},
        ]
        tokens, error = 0, JudgementError()
        for _ in range(self.tries):
            reply = await self.client.chat.completions.create(model=self.model, messages=messages)
            tokens += reply.usage.total_tokens if reply.usage else 0
            text = reply.choices[0].message.content or ""
            try:
                return _scores(text, len(attempts)), tokens
            except JudgementError as problem:
                error = problem
                messages = [
                    *messages[:2],
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": f"{problem}. {form}"},
                ]
        raise error


def _same_for_equals(attempts: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Equal attempts get the mean of what they were given."""
    return {
        attempt: sum(score for text, score in zip(attempts, scores, strict=True) if text == attempt)
        / list(attempts).count(attempt)
        for attempt in attempts
    }


def _scores(text: str, count: int) -> list[float]:
    try:
        given = json.loads(text[text.index("{") : text.rindex("}") + 1])["scores"]
    except (ValueError, KeyError, TypeError):
        raise JudgementError(f"the judge's answer has no scores: {text[:200]!r}") from None
    if not isinstance(given, list) or len(given) != count:
        raise JudgementError(f"the judge gave {given!r} for {count} attempts")
    if not all(isinstance(score, int | float) and not isinstance(score, bool) and 0 <= score <= 1 for score in given):
        raise JudgementError(f"the judge gave {given!r}: scores must be numbers from 0 to 1")
    return [float(score) for score in given]


def _shown(trajectories: Sequence[Trajectory]) -> tuple[str, list[str]]:
    """What was asked, once, and each attempt: what the model itself said and called, and nothing that a tool answered."""
    asked: list[str] = []
    for items in zip(*(each.messages_and_choices for each in trajectories), strict=False):
        if any(is_choice(item) or item != items[0] for item in items):
            break
        asked.append(f"{items[0]['role']}: {items[0].get('content')}")
    attempts = [
        "\n".join(_said(choice.message.model_dump(mode="json")) for choice in each.choices) for each in trajectories
    ]
    return "\n".join(asked), attempts


def _said(message: Mapping[str, Any]) -> str:
    functions = [call.get("function") or {} for call in message.get("tool_calls") or []]
    calls = [f"[calls {function.get('name')}({function.get('arguments')})]" for function in functions]
    return "\n".join(filter(None, [message.get("content"), *calls]))
