"""Trajectories to token sequences, from nothing but the ids that the server returned with each
choice.

Choice k was sampled from prompt ids P_k and gave C_k. If a later choice's prompt starts with P_k +
C_k, its turn continues the same sequence. Otherwise the turn starts a new sequence, which is
counted: the chat template dropped thinking, or rendered an earlier turn differently. Loss lies on
sampled tokens only, with the log-probability and temperature they were sampled with.

Shape suffixes: S tokens, L MoE layers, K experts per token, C most likely ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.batching.advantages import LARGEST_REWARD
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.batching.routed_experts import RoutedExpertsShape, align, decode_routed_experts
from lockstep.batching.top_logprobs import TOP, top_ids
from lockstep.errors import DataError, StaleRolloutError
from lockstep_wire.reply_digest import reply_digest
from lockstep_wire.routed_experts import stored_digest
from lockstep_wire.sampling import LEAST_TEMPERATURE, SAMPLING_DEFAULTS

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice

    from lockstep.rollouts.trajectory import Trajectory

_NEUTRAL: dict[str, tuple[float, ...]] = {
    setting: (value, -1) if setting == "top_k" else (value,)
    for setting, value in SAMPLING_DEFAULTS.items()
    if setting != "temperature"
}
"""Settings under which the server's log-probabilities are those of the temperature-scaled softmax,
which the trainer can compute.
"""


@dataclass(frozen=True)
class Turn:
    """One choice, checked. `prompt_S` and `sampled_S` are int32 ids."""

    name: str
    prompt_S: np.ndarray
    sampled_S: np.ndarray
    logprobs_S: np.ndarray  # float32, of sampled_S
    temperature: float
    steps_S: np.ndarray  # int32, the step that sampled each token
    # [P + N - 1 or P + N, L, K] expert ids, see routed_experts.py; None where experts are not
    # replayed
    experts_SLK: np.ndarray | None = None
    top_SC: np.ndarray | None = (
        None  # int32, the server's most likely ids in the place of sampled_S, see top_logprobs.py
    )
    truncated: bool = False  # cut off by a limit of tokens


MOST_IDS = 2**31
"""As many ids as a batch can tell apart."""


def _ids(value: object, what: str, name: str, vocabulary: int) -> np.ndarray:
    if not isinstance(value, list | tuple) or not all(isinstance(token, int) for token in value):
        raise DataError(
            f"{what}: keep the choice exactly as the server returned it (client = model.openai_client()), and ask without stream; "
            "a choice that is put together from a stream has none"
        )
    unknown = next((token for token in value if not 0 <= token < vocabulary), None)
    if unknown is not None:
        raise DataError(
            f"{name}: token id {unknown} is not one of the model's {vocabulary}: keep the choice exactly as the server returned it"
        )
    return np.asarray(value, dtype=np.int32)


def _logprobs(choice: Choice, count: int, name: str) -> np.ndarray:
    logprobs = (choice.model_extra or {}).get("sampled_logprobs")
    if logprobs is None and choice.logprobs is not None and choice.logprobs.content is not None:
        logprobs = [entry.logprob for entry in choice.logprobs.content]  # the client asked for OpenAI's
    if logprobs is None:
        raise DataError(
            f"{name} has no logprobs though it has token ids: keep the choice exactly as the server returned it"
        )
    if len(logprobs) != count:
        raise DataError(f"{name} has {len(logprobs)} logprobs for {count} sampled tokens")
    values = np.array(logprobs, dtype=np.float32)
    bad = ~(np.isfinite(values) & (values <= 0))
    if bad.any():
        raise DataError(
            f"{name}, token {int(bad.argmax())}: sampling logprob {values[bad][0]} is not a log-probability"
        )
    return values


def _check_unedited(choice: Choice, token_ids: list[int], digest: object, name: str) -> None:
    """Raise DataError if the choice's text or tool calls are not those that the server returned with
    these ids.

    digest: the server's, of ids and message. None: the service gives no digest, and an edit goes
        unseen.
    """
    if digest is not None and reply_digest(token_ids, choice.message.model_dump(mode="json")) != digest:
        raise DataError(
            f"{name} was edited after it was sampled, and would be trained as sampled: keep it exactly as the server returned it, "
            "and put changes into a message of their own"
        )


def check_sampling(trajectory: Trajectory) -> None:
    """Raise DataError for the first choice that was sampled with a setting that can't be trained
    on. A choice that says nothing of its sampling is left to `tokenize`.
    """
    for number, choice in enumerate(trajectory.choices):
        sampling = (choice.model_extra or {}).get("sampling")
        if isinstance(sampling, dict):
            _temperature(sampling, f"choice {number}")


def _temperature(sampling: object, name: str) -> float:
    """The choice's temperature; raises DataError if the trainer can't compute the distribution it
    was sampled from.
    """
    if not isinstance(sampling, dict) or "temperature" not in sampling:
        raise DataError(f"{name} does not say how it was sampled: keep the choice exactly as the server returned it")
    for setting, value in sampling.items():
        if setting == "temperature" or value is None:
            continue
        if value not in _NEUTRAL.get(setting, (0, False, "", [], {})):
            raise DataError(
                f"{name} was sampled with {setting} = {value}, which can't be trained on: "
                f"leave {setting} at its default for training rollouts (it is fine for evaluation)",
                unusable="sampling",
            )
    temperature = float(sampling["temperature"])
    if not (temperature > 0 and math.isfinite(temperature)):
        raise DataError(
            f"{name} was sampled with temperature = {temperature}, which can't be trained on: use one above 0",
            unusable="sampling",
        )
    if temperature < LEAST_TEMPERATURE:
        raise DataError(
            f"{name} was sampled with temperature = {temperature}, which vLLM raises to {LEAST_TEMPERATURE}: use that or more",
            unusable="sampling",
        )
    return temperature


def _steps(spans: object, count: int, model_name: str, name: str) -> np.ndarray:
    """int32 `[count]`: the step of `model_name` that sampled each token; the choice's spans must
    cover all of them.
    """
    if not isinstance(spans, list) or (count and not spans):
        raise StaleRolloutError(f"{name} carries no weight version: sample it with model.openai_client()")
    steps, position = [], 0
    for span in spans:
        version = str(span.get("version"))
        owner, _, step = version.rpartition("@")
        if owner != model_name or not step.isdecimal():
            raise StaleRolloutError(
                f"{name} was sampled by {version!r}, not by a version of {model_name}: "
                "ask the server for model.inference_name()"
            )
        if span.get("start") != position or span.get("end") < position:
            raise StaleRolloutError(f"{name}: its weight versions do not cover token {position}")
        steps += [int(step)] * (span["end"] - position)
        position = span["end"]
    if position != count:
        raise StaleRolloutError(f"{name}: its weight versions cover {position} of {count} sampled tokens")
    return np.array(steps, dtype=np.int32)


def read_turn(
    choice: Choice,
    model_name: str,
    name: str,
    routed_experts: RoutedExpertsShape | None = None,
    vocabulary: int = MOST_IDS,
) -> Turn:
    """Check one choice.

    vocabulary: how many ids the model has.

    Raises DataError (or StaleRolloutError) naming it: ids, logprobs, sampling settings or version
    missing or wrong.
    """
    extra: dict[str, Any] = choice.model_extra or {}
    prompt_S = _ids(extra.get("prompt_token_ids"), f"{name} has no prompt_token_ids", name, vocabulary)
    sampled_S = _ids(extra.get("token_ids"), f"{name} has no token_ids", name, vocabulary)
    if not len(prompt_S):
        raise DataError(f"{name} has an empty prompt: its first token was predicted by nothing")
    _check_unedited(choice, sampled_S.tolist(), extra.get("reply_digest"), name)
    return Turn(
        name=name,
        prompt_S=prompt_S,
        sampled_S=sampled_S,
        logprobs_S=_logprobs(choice, len(sampled_S), name),
        temperature=_temperature(extra.get("sampling"), name),
        steps_S=_steps(extra.get("weight_versions"), len(sampled_S), model_name, name),
        experts_SLK=None
        if routed_experts is None or not len(sampled_S)
        else decode_routed_experts(
            extra.get("routed_experts"), stored_digest(extra), prompt_S, sampled_S, routed_experts, name
        ),
        top_SC=top_ids(choice),
        truncated=choice.finish_reason == "length",
    )


@dataclass(eq=False)
class _Growing:
    """A sequence that later turns may continue."""

    tokens_S: np.ndarray
    turns: list[Turn] = field(default_factory=list)

    def continued_by(self, turn: Turn) -> bool:
        size = len(self.tokens_S)
        return len(turn.prompt_S) >= size and np.array_equal(turn.prompt_S[:size], self.tokens_S)

    def append(self, turn: Turn) -> None:
        self.tokens_S = np.concatenate([turn.prompt_S, turn.sampled_S])
        self.turns.append(turn)


def merge_turns(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Turns of one trajectory to sequences: each turn joins the latest sequence that its prompt
    continues, or starts a new one.
    """
    growing: list[_Growing] = []
    for turn in turns:
        target = next((candidate for candidate in reversed(growing) if candidate.continued_by(turn)), None)
        if target is None:
            target = _Growing(turn.prompt_S[:0])
            growing.append(target)
        target.append(turn)
    return [conversation.turns for conversation in growing]


def sequence_of(turns: Sequence[Turn], name: str, group: int, trajectory: int) -> tuple[TokenSequence, int]:
    """One token sequence from turns that continue each other, and how many of its tokens have two
    different routed experts.
    """
    last = turns[-1]
    tokens_S = np.concatenate([last.prompt_S, last.sampled_S])
    mask_S = np.zeros(len(tokens_S), dtype=bool)
    logprobs_S = np.full(len(tokens_S), np.nan, dtype=np.float32)
    temperatures_S = np.ones(len(tokens_S), dtype=np.float32)
    steps_S = np.full(len(tokens_S), -1, dtype=np.int32)
    ranked = any(turn.top_SC is not None for turn in turns)
    top_SC = np.full((len(tokens_S), TOP), -1, dtype=np.int32) if ranked else None
    for turn in turns:
        here = slice(len(turn.prompt_S), len(turn.prompt_S) + len(turn.sampled_S))
        mask_S[here] = True
        logprobs_S[here] = turn.logprobs_S
        temperatures_S[here] = turn.temperature
        steps_S[here] = turn.steps_S
        if top_SC is not None and turn.top_SC is not None:
            top_SC[here] = turn.top_SC
    recorded = [turn.experts_SLK for turn in turns if turn.experts_SLK is not None]
    aligned = align(recorded, len(tokens_S), name) if recorded else None
    sequence = TokenSequence(
        name,
        tokens_S,
        mask_S,
        logprobs_S,
        temperatures_S,
        None if aligned is None else aligned.experts_SLK,
        None if aligned is None else aligned.routed_S,
        group,
        trajectory,
        steps_S,
        top_SC,
    )
    return sequence, 0 if aligned is None else aligned.disagreeing


@dataclass(frozen=True)
class TurnPlace:
    """Where a turn's sampled tokens are.

    number: of the trajectory's choice. sequence: of its sequences.
    start, stop: the tokens of that sequence.
    """

    number: int
    sequence: int
    start: int
    stop: int


@dataclass(frozen=True)
class Tokenized:
    """A trajectory's sequences.

    `splits`: turns that did not continue an earlier one.
    `steps`: versions that sampled it.

    `replies`: sampled tokens of each turn.
    `truncated`: how many of these a limit of tokens cut off.
    `disagreeing`: tokens for which two turns recorded different experts.
    `turns`: of each turn that sampled a token, in their order.
    """

    sequences: list[TokenSequence]
    splits: int
    steps: frozenset[int]
    replies: tuple[int, ...]
    truncated: int
    disagreeing: int = 0
    turns: tuple[TurnPlace, ...] = ()


def tokenize(
    trajectory: Trajectory,
    model_name: str,
    group: int,
    index: int,
    routed_experts: RoutedExpertsShape | None = None,
    vocabulary: int = MOST_IDS,
) -> Tokenized:
    """The training sequences of one trajectory.

    `routed_experts`: the model's, where experts are replayed.
    vocabulary: how many ids it has.

    Raises DataError naming trajectory and choice, also if nothing in it was sampled.
    """
    name = f"group {group}, trajectory {index}"
    if not abs(trajectory.reward) <= LARGEST_REWARD:
        raise DataError(f"{name}: reward {trajectory.reward} is not a usable number", unusable="reward")
    try:
        choices = trajectory.choices
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    turns = [
        read_turn(choice, model_name, f"{name}, choice {k}", routed_experts, vocabulary)
        for k, choice in enumerate(choices)
    ]
    if not any(len(turn.sampled_S) for turn in turns):
        what = "no choice" if not turns else "no sampled token in any choice"
        raise DataError(
            f"{name} has {what}: put the server's choices (response.choices[0]) into messages_and_choices",
            unusable="nothing_sampled",
        )
    merged = merge_turns([turn for turn in turns if len(turn.sampled_S)])
    names = [name] if len(merged) == 1 else [f"{name}, sequence {k}" for k in range(len(merged))]
    made = [sequence_of(part, label, group, index) for label, part in zip(names, merged, strict=True)]
    return Tokenized(
        sequences=[sequence for sequence, _ in made],
        splits=len(merged) - 1,
        steps=frozenset(step for turn in turns for step in np.unique(turn.steps_S).tolist()),
        replies=tuple(len(turn.sampled_S) for turn in turns),
        truncated=sum(turn.truncated for turn in turns),
        disagreeing=sum(count for _, count in made),
        turns=_places(turns, merged),
    )


def _places(turns: list[Turn], merged: list[list[Turn]]) -> tuple[TurnPlace, ...]:
    numbers = {id(turn): number for number, turn in enumerate(turns)}
    places = [
        TurnPlace(numbers[id(turn)], k, len(turn.prompt_S), len(turn.prompt_S) + len(turn.sampled_S))
        for k, part in enumerate(merged)
        for turn in part
    ]
    return tuple(sorted(places, key=lambda place: place.number))


def check_staleness(steps: frozenset[int], step: int, max_steps_off_policy: int, name: str) -> None:
    """Raise StaleRolloutError if a version is later than the current `step` or older than allowed."""
    if max(steps) > step:
        raise StaleRolloutError(
            f"{name} was sampled by step {max(steps)}, but the model is at step {step}: it belongs to another run"
        )
    if step - min(steps) > max_steps_off_policy:
        raise StaleRolloutError(
            f"{name} was sampled by step {min(steps)}, {step - min(steps)} steps before the current one: "
            f"roll out again, or raise max_steps_off_policy (now {max_steps_off_policy})",
            unusable="stale",
        )
