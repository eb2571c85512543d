"""An episode's messages as a tree. A node owns its own messages and tokens; the path to it has the rest.

A node of context is what the agent sent since the reply before, as the template rendered it. Each of its replies is a node
below it, with the sampled ids. A request that extends a reply gets the ids of the path and renders the new messages only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lockstep.gateway.messages import Message, common_prefix, identity, same_reply
from lockstep_wire.history import History

Fork = Literal["compaction", "edit", "sub-agent", "retry"]


@dataclass(eq=False)
class Reply:
    """One sampled choice: its message as the server sent it, its ids, and the number of its call."""

    context: Context
    message: Message
    ids: list[int]
    call: int
    contexts: list[Context] = field(default_factory=list)


@dataclass(eq=False)
class Context:
    """What the agent sent after `parent`, and the ids that the template made of it, the generation prompt included.

    call: the number of the call that brought it.
    """

    setting: str
    parent: Reply | None
    messages: list[Message]
    ids: list[int]
    call: int
    replies: list[Reply] = field(default_factory=list)

    def path(self) -> list[Context | Reply]:
        """Every node from the root to this one."""
        nodes: list[Context | Reply] = [self]
        while (reply := nodes[-1].parent if isinstance(nodes[-1], Context) else None) is not None:
            nodes += [reply, reply.context]
        return nodes[::-1]

    def conversation(self) -> list[Message]:
        """All messages up to here, replies as they were sampled."""
        conversation: list[Message] = []
        for node in self.path():
            conversation += node.messages if isinstance(node, Context) else [node.message]
        return conversation


@dataclass(frozen=True)
class Place:
    """Where a request belongs: below `parent`, whose conversation has its first `known` messages."""

    parent: Reply | None
    known: int
    new: list[Message]

    def conversation(self) -> list[Message]:
        """The request's messages, those known as they were sampled."""
        if self.parent is None:
            return self.new
        return [*self.parent.context.conversation(), self.parent.message, *self.new]

    def history(self) -> History | None:
        """The ids that the request continues."""
        if self.parent is None:
            return None
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for node in [*self.parent.context.path(), self.parent]:
            # A reply that the agent brought was rendered as the template then wrote replies. Later it may write them otherwise.
            if isinstance(node, Context) and all(message["role"] != "assistant" for message in node.messages):
                spans.append((len(ids), len(ids) + len(node.ids)))
            ids += node.ids
        return History(self.known, ids, spans)


class Tree:
    """All nodes of an episode. One thread at a time may use a tree."""

    def __init__(self) -> None:
        self.roots: list[Context] = []

    def contexts(self) -> Iterator[Context]:
        """Every node of context, parents before their children."""
        waiting = list(self.roots)
        while waiting:
            context = waiting.pop()
            yield context
            waiting += [below for reply in context.replies for below in reply.contexts]

    def place(self, setting: str, messages: Sequence[Message]) -> Place:
        """The deepest reply that the request continues; of several the latest."""
        best: tuple[int, Reply | None] = (0, None)
        waiting = [(root, 0) for root in self.roots if root.setting == setting]
        while waiting:
            context, start = waiting.pop(0)
            end = start + len(context.messages)
            if end >= len(messages) or not _equal(context.messages, messages[start:end]):
                continue
            for reply in context.replies:
                if same_reply(messages[end], reply.message):
                    if end + 1 >= best[0]:
                        best = (end + 1, reply)
                    waiting += [(below, end + 1) for below in reply.contexts]
        known, parent = best
        return Place(parent, known, list(messages[known:]))

    def add(
        self, setting: str, place: Place, ids: list[int], call: int, replies: Sequence[tuple[Message, list[int]]]
    ) -> None:
        """Keep what a call gave. ids: those of the new messages. replies: message and ids of each choice."""
        siblings = self.roots if place.parent is None else place.parent.contexts
        context = next((known for known in siblings if known.setting == setting and known.ids == ids), None)
        if context is None:
            context = Context(setting, place.parent, place.new, ids, call)
            siblings.append(context)
        context.replies += [Reply(context, message, sampled, call) for message, sampled in replies]

    def forks(self) -> Counter[Fork]:
        """How often the history changed, by what became of it.

        retry: the same messages were sampled again. sub-agent: a conversation with instructions or tools of its own, or one after
        which the earlier conversation went on. compaction: a shorter history that replaced the earlier one. edit: any other.
        """
        kinds: Counter[Fork] = Counter()
        ordered = sorted(self.contexts(), key=lambda context: context.call)
        for position, context in enumerate(ordered):
            kinds["retry"] += len(context.replies) - 1
            siblings = self.roots if context.parent is None else context.parent.contexts
            if siblings[0] is not context:
                kinds[self._kind(context, ordered[:position], ordered[position + 1 :])] += 1
        return +kinds

    def _kind(self, context: Context, earlier: list[Context], later: list[Context]) -> Fork:
        conversation = context.conversation()
        nearest = max(earlier, key=lambda other: (common_prefix(other.conversation(), conversation), other.call))
        before = [*nearest.conversation(), *(reply.message for reply in nearest.replies[-1:])]
        shared = common_prefix(before, conversation)
        if nearest.setting != context.setting or _instructions(before) != _instructions(conversation):
            return "sub-agent"
        if any(below.parent in nearest.replies for below in later):
            return "sub-agent" if shared <= len(_instructions(before)) else "edit"
        kept = {identity(message) for message in before[shared:]} & {
            identity(message) for message in conversation[shared:]
        }
        return "compaction" if len(conversation) < len(before) and not kept else "edit"


def _instructions(conversation: Sequence[Message]) -> list[tuple[object, ...]]:
    return [identity(message) for message in conversation if message["role"] == "system"]


def _equal(known: Sequence[Message], sent: Sequence[Message]) -> bool:
    return len(known) == len(sent) and all(
        left == right or identity(left) == identity(right) for left, right in zip(known, sent, strict=True)
    )
