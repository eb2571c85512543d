"""Chats to token sequences for supervised training: loss lies on assistant turns only.

A turn's text is the difference of two renderings of the chat template: the conversation up to the turn
with a generation prompt, and the conversation with the turn. The first must begin the second. Prompt
and turn are tokenized apart, as the server does: the model learns to continue the very tokens that a
request brings. Turns whose prompts continue
each other share a sequence, as those of rollouts do. Where a template rewrites earlier turns (dropped
thinking), each turn stands after the history that it would see.

Shape suffix: S tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lockstep.batching.prefix_tree import TokenSequence
from lockstep.batching.tokenize import Turn, merge_turns, sequence_of
from lockstep.errors import DataError

_MOST_NAMED = 5
"""Rows that an error names."""


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class ChatFormat:
    """How a model's chats become tokens.

    stops: ids that end a turn (the tokenizer's and the generation config's end of sequence).
    template: a chat template in place of the tokenizer's.
    """

    tokenizer: Tokenizer
    stops: frozenset[int]
    template: str | None = None

    def text(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            [_message(message) for message in messages],
            tools=tools,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=self.template,
        )

    def ids(self, text: str) -> np.ndarray:
        """int32; the template has written a beginning-of-sequence token if there is to be one."""
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


@dataclass(frozen=True)
class Chat:
    """A conversation in OpenAI's form. `name` is what errors call it: "line 12"."""

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def read(cls, row: Any, name: str) -> Chat:
        """Raises DataError for a row that is no conversation with an assistant's turn."""
        if not isinstance(row, Mapping) or not isinstance(row.get("messages"), list) or not row["messages"]:
            raise DataError(f'{name}: expected {{"messages": [...], "tools": [...] or nothing}}')
        for message in row["messages"]:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise DataError(f"{name}: each message needs a role")
            content = message.get("content")
            if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
                raise DataError(f"{name}: a message of {message['role']} has no text as its content")
        if not any(message["role"] == "assistant" for message in row["messages"]):
            raise DataError(f"{name}: no message of an assistant, so nothing to learn")
        return cls(name, [dict(message) for message in row["messages"]], row.get("tools"))


@dataclass(frozen=True)
class Chats:
    """The rows of a data set, and those that can't be trained on.

    rows: each row's sequences, with the row's number as their group.
    raw: the same rows as they came.
    refused: "line 12: why", in order.
    """

    rows: list[list[TokenSequence]] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def check(self, tolerated: bool, where: str) -> None:
        """Raise DataError, naming the first rows, if there are refused ones that nobody tolerates, or
        no others.
        """
        named = "; ".join(self.refused[:_MOST_NAMED]) + ("; ..." if len(self.refused) > _MOST_NAMED else "")
        total = len(self.rows) + len(self.refused)
        if not self.rows:
            raise DataError(f"{where} has no row to train on{': ' + named if named else ''}")
        if self.refused and not tolerated:
            raise DataError(f"{where}: {len(self.refused)} of {total} rows can't be trained on: {named}")


def read_chats(path: Path, form: ChatFormat, loss_on: Literal["all", "last"], longest: int) -> Chats:
    """Every row of a JSONL file, tokenized. Raises DataError for a file that can't be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from None
    chats = Chats()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            chats.refused.append(f"line {number}: no JSON ({error})")
            continue
        _add(chats, row, f"line {number}", form, loss_on, longest)
    return chats


def tokenize_chats(rows: Iterable[Any], form: ChatFormat, loss_on: Literal["all", "last"], longest: int) -> Chats:
    """The same for rows in memory, which are called by their number from 0."""
    chats = Chats()
    for number, row in enumerate(rows):
        _add(chats, row, f"row {number}", form, loss_on, longest)
    return chats


def _add(chats: Chats, row: Any, name: str, form: ChatFormat, loss_on: Literal["all", "last"], longest: int) -> None:
    try:
        sequences = chat_sequences(Chat.read(row, name), form, loss_on, len(chats.rows))
        for sequence in sequences:
            if len(sequence) > longest:
                raise DataError(f"{name}: {len(sequence)} tokens, the limit is {longest}")
    except DataError as error:
        chats.refused.append(str(error))
    else:
        chats.rows.append(sequences)
        chats.raw.append(row)


def chat_sequences(
    chat: Chat, form: ChatFormat, loss_on: Literal["all", "last"], number: int = 0
) -> list[TokenSequence]:
    """One sequence for each history that its turns need, all with `number` as their group.

    loss_on: all assistant turns, or the last one only.

    Raises DataError for a turn that can't be separated from its prompt, or is empty.
    """
    replies = [k for k, message in enumerate(chat.messages) if message["role"] == "assistant"]
    turns = [_turn(chat, k, form) for k in (replies if loss_on == "all" else replies[-1:])]
    merged = merge_turns(turns)
    names = [chat.name] if len(merged) == 1 else [f"{chat.name}, sequence {k}" for k in range(len(merged))]
    return [sequence_of(part, name, number, 0)[0] for part, name in zip(merged, names, strict=True)]


def _turn(chat: Chat, index: int, form: ChatFormat) -> Turn:
    name = f"{chat.name}, message {index}"
    try:
        before = form.text(chat.messages[:index], chat.tools, prompt=True)
        after = form.text(chat.messages[: index + 1], chat.tools, prompt=False)
    except Exception as error:  # noqa: BLE001 (a template may raise anything)
        raise DataError(f"{name}: the chat template can't render it: {type(error).__name__}: {error}") from None
    if not after.startswith(before):
        raise DataError(
            f"{name}: the chat template does not begin the turn with its own prompt, so the two can't be separated"
        )
    prompt_S, reply_S = form.ids(before), _until_stop(form.ids(after[len(before) :]), form.stops)
    if not len(prompt_S) or not set(reply_S.tolist()) - form.stops:
        raise DataError(f"{name}: the turn is empty")
    return Turn(
        name=name,
        prompt_S=prompt_S,
        sampled_S=reply_S,
        logprobs_S=np.full(len(reply_S), np.nan, dtype=np.float32),
        temperature=1.0,
        steps_S=np.full(len(reply_S), -1, dtype=np.int32),
    )


def _until_stop(reply_S: np.ndarray, stops: frozenset[int]) -> np.ndarray:
    """The turn with the token that ends it, and without what the template writes after: no model
    samples that.
    """
    ends = np.flatnonzero(np.isin(reply_S, list(stops)))
    return reply_S[: ends[-1] + 1] if len(ends) else reply_S


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As chat templates expect it: the arguments of tool calls as objects."""
    message = dict(message)
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return message


def _call(call: Any) -> Any:
    arguments = call["function"]["arguments"]
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {**call, "function": {**call["function"], "arguments": parsed}}
