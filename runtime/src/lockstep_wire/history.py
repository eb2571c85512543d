"""A chat prompt that continues what was sampled: the ids of earlier turns as they are, and only the new messages rendered.

A chat template renders the whole conversation anew, and often otherwise than it was sampled: without thinking, with other
whitespace in a tool call. So a request may bring the ids of the messages that it continues, and the server puts them
together with the new messages' own rendering. That rendering is the end of a short conversation that has the new messages
after a reply with a marker in it. The rendering of the whole conversation checks it, token by token.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIELD = "lockstep_history"
"""The request's field that brings a history."""
MARKER = "lockstep 7f3a91c4 §"
"""The text of the reply that stands in for what was sampled."""
STANDS_FOR_ASKING = {"role": "user", "content": "?"}


class MisalignedError(ValueError):
    """The template renders the conversation in a way that the ids of earlier turns do not fit into."""


@dataclass(frozen=True)
class History:
    """messages: how many of the request's messages `ids` stand for; the last of them is a sampled reply.

    context: spans `(start, end)` of `ids` that the template made of messages that are no replies, generation prompts
        included. The rest was sampled, or is a reply that the agent brought, and is not compared.
    """

    messages: int
    ids: list[int]
    context: list[tuple[int, int]]

    def encode(self) -> dict[str, Any]:
        """As it travels in a request: ids as base64 of little-endian int32."""
        return {
            "messages": self.messages,
            "ids": base64.b64encode(array("i", self.ids).tobytes()).decode(),
            "context": [list(span) for span in self.context],
        }


def decode(field: Mapping[str, Any]) -> History:
    """The history that a request brings. Raises ValueError for one that is malformed."""
    ids = array("i")
    ids.frombytes(base64.b64decode(field["ids"], validate=True))
    context = [(int(start), int(end)) for start, end in field["context"]]
    edges = [edge for span in context for edge in span]
    if edges != sorted(edges) or any(not 0 <= edge <= len(ids) for edge in edges) or int(field["messages"]) < 1:
        raise ValueError(f"{FIELD} is malformed: its context must be spans of its ids, in order")
    return History(int(field["messages"]), ids.tolist(), context)


def short_conversation(new: Sequence[Any]) -> list[Any]:
    """The conversation whose rendering ends as a continued prompt does."""
    return [STANDS_FOR_ASKING, {"role": "assistant", "content": MARKER}, *new]


def after_marker(rendered: Sequence[int], marker: Sequence[int]) -> list[int]:
    """What follows the marker in a rendered short conversation: the end of a turn, the new messages, the generation prompt.

    marker: the ids of MARKER alone. Its first id may differ in a rendering, where it joins what stands before it.
    """
    tail = list(marker[1:])
    position = _position(rendered, tail, 0)
    if not tail or position is None:
        raise MisalignedError("the chat template does not render a reply's text as it is")
    return list(rendered[position + len(tail) :])


def generation_prompt(with_prompt: Sequence[int], without: Sequence[int]) -> list[int]:
    """The ids that a template adds where the model is to reply, from the same conversation rendered with and without."""
    if list(with_prompt[: len(without)]) != list(without):
        raise MisalignedError("the chat template's generation prompt is not at the end")
    return list(with_prompt[len(without) :])


def continued(history: History, full: Sequence[int], new: Sequence[int], prompt: Sequence[int]) -> list[int]:
    """The ids to sample from: the history's, then the new messages'.

    full: the whole conversation as the template renders it. new: what `after_marker` gave. prompt: the generation prompt.
    Raises MisalignedError, naming the first token that differs, unless `full` consists of the context of the history and of
    `new`, in order, with nothing but replies between them.
    """
    start = len(full) - len(new)
    for offset, token in enumerate(new):
        if start + offset < 0 or full[start + offset] != token:
            has = full[start + offset] if start + offset >= 0 else "nothing"
            raise MisalignedError(
                f"token {len(history.ids) + offset} of the prompt is {token} where the new messages are rendered alone and "
                f"{has} in the whole conversation: the chat template renders a message differently by what stands before it"
            )
    position = 0
    for first, last in history.context:
        body = history.ids[first:last]
        if prompt and body[-len(prompt) :] == list(prompt):
            body = body[: -len(prompt)]
        place = _position(full, body, position)
        if place is None or place + len(body) > start or (first == 0 and place != 0):
            raise MisalignedError(_first_difference(full, body, position, first))
        position = place + len(body)
    joined = new[1:] if new and history.ids[-1] == new[0] else new
    return [*history.ids, *joined]


def _first_difference(full: Sequence[int], body: Sequence[int], position: int, first: int) -> str:
    """Which token of an earlier turn's context the conversation no longer has, at the place where most of it fits."""
    starts = [0] if position == 0 else [place for place in range(position, len(full)) if full[place] == body[0]]
    same = 0
    for start in starts:
        count = next(
            (k for k, token in enumerate(body) if start + k >= len(full) or full[start + k] != token), len(body)
        )
        same = max(same, count)
    same = min(same, len(body) - 1)
    return (
        f"token {first + same} of the prompt was {body[same]} and the chat template now renders something else in its place: "
        "the template changes earlier messages by what follows them"
    )


def _position(ids: Sequence[int], part: Sequence[int], start: int) -> int | None:
    """Where `part` lies in `ids` at or after `start`."""
    if not part:
        return start
    haystack, needle = array("i", ids).tobytes(), array("i", part).tobytes()
    place = haystack.find(needle, start * 4)
    while place >= 0 and place % 4:
        place = haystack.find(needle, place + 1)
    return place // 4 if place >= 0 else None
