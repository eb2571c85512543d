"""The trajectories of a run, each with its messages and what is known of its tokens.

An index row per trajectory is small and shown at once. The transcripts of some tens of trajectories
make a chunk, which the page unpacks when somebody opens one of them.
"""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.batching.token_table import TrainedSequence, read_token_table
from lockstep.cli.report.mask import masked, masked_pieces
from lockstep.cli.report.token_text import TokenText
from lockstep.errors import StoreError
from lockstep.rollouts.parquet import read_parquet
from lockstep.rollouts.trajectory import Trajectory, TrajectoryGroup, is_choice

KINDS = ("train", "evaluation")
INDEX = ("kind", "step", "group", "trajectory", "reward", "turns", "tokens", "truncated", "chunk", "place")
"""The columns of an index row. kind: into KINDS; place: in the chunk."""
_CHUNK_TOKENS = 50_000
"""Sampled tokens after which a chunk ends: a few hundred kilobytes."""
_EXPERT_BYTES = 16_000_000
"""Routed experts that a page carries; those of later steps come first."""


@dataclass
class Transcripts:
    """index: rows as INDEX names them.
    failures: of rollouts that raised: kind, step, group, type, message, where.
    damaged: files that could not be read, and why.
    experts_left_out: choices whose routed experts are not in here, for the size.
    """

    index: list[list[Any]] = field(default_factory=list)
    chunks: list[list[dict[str, Any]]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    experts_left_out: int = 0
    _expert_bytes: int = 0
    _tokens: int = 0

    def add(self, kind: int, step: int, group: int, place: int, trajectory: Trajectory, items: list[Any]) -> None:
        replies = [item for item in items if "ids" in item]
        tokens = sum(len(item["ids"]) for item in replies)
        if not self.chunks or self._tokens > _CHUNK_TOKENS:
            self.chunks.append([])
            self._tokens = 0
        self._tokens += tokens + 50
        cut = sum(item["finish"] == "length" for item in replies)
        row = [kind, step, group, place, _rounded(trajectory.reward), len(replies), tokens, cut]
        self.index.append([*row, len(self.chunks) - 1, len(self.chunks[-1])])
        said = {
            "items": items,
            "metrics": trajectory.metrics,
            "metadata": trajectory.metadata,
            "tools": trajectory.tools,
        }
        self.chunks[-1].append(
            {name: masked(value) if name != "items" else value for name, value in said.items() if value}
        )

    def room_for(self, experts: bytes) -> bool:
        if self._expert_bytes + len(experts) > _EXPERT_BYTES:
            self.experts_left_out += 1
            return False
        self._expert_bytes += len(experts)
        return True


def read_transcripts(run: Path, text: TokenText) -> Transcripts:
    """Of every gather that ended, the newest step first. A damaged file is named in the result."""
    made = Transcripts()
    for kind, step, file in _files(run):
        try:
            groups = read_parquet(file)
            trained = _trained(run, step) if KINDS[kind] == "train" else {}
        except StoreError as error:
            made.damaged.append(str(error))
            continue
        for number, group in enumerate(groups):
            _add_group(made, kind, step, number, group, trained, text)
    return made


def _files(run: Path) -> Iterator[tuple[int, int, Path]]:
    files = [
        (int(file.stem), kind, file)
        for kind, name in enumerate(KINDS)
        for file in (run / "trajectories" / name).glob("[0-9]*.parquet")
        if file.stem.isdecimal()  # not an attempt that was set aside
    ]
    for step, kind, file in sorted(files, key=lambda entry: (-entry[0], entry[1])):
        yield kind, step, file


def _trained(run: Path, step: int) -> dict[tuple[int, int], list[TrainedSequence]]:
    file = run / "tokens" / f"{step:04d}.parquet"
    sequences: dict[tuple[int, int], list[TrainedSequence]] = defaultdict(list)
    for sequence in read_token_table(file) if file.exists() else []:
        sequences[sequence.group, sequence.trajectory].append(sequence)
    return sequences


def _add_group(
    made: Transcripts,
    kind: int,
    step: int,
    number: int,
    group: TrajectoryGroup,
    trained: dict[tuple[int, int], list[TrainedSequence]],
    text: TokenText,
) -> None:
    for place, trajectory in enumerate(group.trajectories):
        sequences = trained.get((number, place), [])
        items = [
            _reply(made, item, sequences, text) if is_choice(item) else masked(_message(item))
            for item in trajectory.messages_and_choices
        ]
        made.add(kind, step, number, place, trajectory, items)
    for failure in group.exceptions:
        said = masked({"type": failure.type, "message": failure.message, "where": failure.where})
        made.failures.append({"kind": kind, "step": step, "group": number, **said})


def _message(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if value is not None}


def _reply(made: Transcripts, choice: Any, sequences: Sequence[TrainedSequence], text: TokenText) -> dict[str, Any]:
    """A choice: ids, text, both log-probabilities and the advantage of each token."""
    fields = choice.model_dump(mode="json", exclude_none=True)
    ids = fields.get("token_ids") or []
    logprobs = fields.get("sampled_logprobs") or _listed_logprobs(fields)
    reply: dict[str, Any] = {
        "role": "assistant",
        "finish": choice.finish_reason,
        "ids": ids,
        "text": masked_pieces(text.pieces(ids)) if ids else [masked(choice.message.content or "")],
        "server": [_rounded(value) for value in logprobs],
        "versions": [[part["version"], part["start"], part["end"]] for part in fields.get("weight_versions", [])],
        "calls": masked(fields["message"].get("tool_calls", [])),
        "thinking": masked(fields["message"].get("reasoning", "")),
    }
    start = len(fields.get("prompt_token_ids") or [])
    reply |= _of_trainer(ids, start, sequences) | _experts(made, fields.get("routed_experts"), start, len(ids))
    return {name: value for name, value in reply.items() if value or name in ("ids", "text", "finish", "advantage")}


def _listed_logprobs(fields: dict[str, Any]) -> list[float]:
    return [entry["logprob"] for entry in (fields.get("logprobs") or {}).get("content") or []]


def _of_trainer(ids: list[int], start: int, sequences: Sequence[TrainedSequence]) -> dict[str, Any]:
    """The trainer's log-probabilities and the advantage, from the sequence that holds the choice's
    tokens in their place.
    """
    for sequence in sequences:
        first = int(np.searchsorted(sequence.positions_P, start))
        last = first + len(ids)
        positions = sequence.positions_P[first:last]
        in_place = np.array_equal(positions, np.arange(start, start + len(ids)))
        if ids and in_place and np.array_equal(sequence.token_ids_P[first:last], ids):
            values = [_rounded(float(value)) for value in sequence.logprobs_P[first:last]]
            return {
                "trainer": values if any(value is not None for value in values) else [],
                "advantage": _rounded(sequence.advantage),
            }
    return {}


def _experts(made: Transcripts, encoded: str | None, start: int, size: int) -> dict[str, Any]:
    """The routed experts of the sampled tokens: shape `[tokens, layers, experts per token]` and
    bytes, base64.
    """
    if not encoded:
        return {}
    try:
        experts_SLK = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)[start : start + size]
    except ValueError:
        return {}
    data = experts_SLK.astype("<u2").tobytes()
    if not made.room_for(data):
        return {}
    return {"experts": {"shape": list(experts_SLK.shape), "data": base64.b64encode(data).decode()}}


def _rounded(value: float) -> float | None:
    """Seven significant digits, as fp32 has; None for no number, which JSON does not have."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
