"""Trajectories in one Parquet file, without loss: one row per trajectory, token ids and
log-probabilities as number columns.

Columns: step, group, trajectory, reward, turn_rewards; messages, tools, metrics and metadata as JSON; choices as
a list of structs. A struct has the token ids, the log-probabilities, the routed experts (the
server's .npy bytes) and the rest as JSON. In `messages`, a choice is {"choice": k}. What belongs to
a group (metadata, failures) is in the file's own metadata, so that a group without trajectories is
kept too.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from lockstep.errors import DataError, StoreError
from lockstep.process.durable import replacing
from lockstep.rollouts.trajectory import RolloutFailure, Trajectory, TrajectoryGroup, is_choice

if TYPE_CHECKING:
    import pyarrow

SCHEMA = "lockstep.trajectories/1"
_KEY = b"lockstep"
_DIGEST = b"lockstep.sha256"
"""Of what is said of the groups. Parquet's own checksums cover the columns, not that."""


def _columns() -> pyarrow.Schema:
    import pyarrow as pa

    choice = pa.struct(
        [
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("token_ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float64())),
            ("routed_experts", pa.binary()),
            ("rest", pa.string()),
        ]
    )
    return pa.schema(
        [
            ("step", pa.int32()),
            ("group", pa.int32()),
            ("trajectory", pa.int32()),
            ("reward", pa.float64()),
            ("turn_rewards", pa.list_(pa.float64())),
            ("messages", pa.string()),
            ("choices", pa.list_(choice)),
            ("tools", pa.string()),
            ("metrics", pa.string()),
            ("metadata", pa.string()),
        ]
    )


def _split_choice(choice: Any) -> dict[str, Any]:
    """A choice as a struct: its bulky numbers in columns of their own, everything else as JSON."""
    rest = choice.model_dump(mode="json", exclude_unset=True)
    struct: dict[str, Any] = {
        "prompt_token_ids": rest.pop("prompt_token_ids", None),
        "token_ids": rest.pop("token_ids", None),
    }
    content = (rest.get("logprobs") or {}).get("content")
    struct["logprobs"] = rest.pop("sampled_logprobs", None)
    if struct["logprobs"] is None and content is not None:
        struct["logprobs"] = [entry.pop("logprob") for entry in content]
    routed_experts = rest.get("routed_experts")
    struct["routed_experts"] = None
    if isinstance(routed_experts, str):
        try:
            data = base64.b64decode(routed_experts, validate=True)
        except binascii.Error:
            data = b""
        # A text that bytes can't restore exactly stays in the JSON.
        if base64.b64encode(data).decode() == routed_experts:
            struct["routed_experts"] = data
            del rest["routed_experts"]
    struct["rest"] = json.dumps(rest)
    return struct


def _join_choice(struct: dict[str, Any]) -> dict[str, Any]:
    choice = json.loads(struct["rest"])
    for name in ("prompt_token_ids", "token_ids"):
        if struct[name] is not None:
            choice[name] = struct[name]
    if struct["routed_experts"] is not None:
        choice["routed_experts"] = base64.b64encode(struct["routed_experts"]).decode()
    content = (choice.get("logprobs") or {}).get("content")
    if struct["logprobs"] is None:
        return choice
    if content is None:
        choice["sampled_logprobs"] = struct["logprobs"]
    else:
        for entry, logprob in zip(content, struct["logprobs"], strict=True):
            entry["logprob"] = logprob
    return choice


def _json(value: Any, where: str) -> str:
    """JSON of what a user put together. Raises DataError for what is none; objects of the OpenAI
    client are written as their fields.
    """
    try:
        return json.dumps(value, default=_plain)
    except TypeError as error:
        raise DataError(f"{where} can't be written to Parquet: {error}") from None


def _plain(value: object) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _row(step: int, group: int, index: int, trajectory: Trajectory) -> dict[str, Any]:
    messages: list[Any] = []
    choices: list[dict[str, Any]] = []
    where = f"group {group}, trajectory {index}"
    for item in trajectory.messages_and_choices:
        if is_choice(item):
            messages.append({"choice": len(choices)})
            choices.append(_split_choice(item))
        else:
            messages.append(item)
    return {
        "step": step,
        "group": group,
        "trajectory": index,
        "reward": trajectory.reward,
        "turn_rewards": trajectory.turn_rewards,
        "messages": _json(messages, f"{where}: messages_and_choices"),
        "choices": choices,
        "tools": None if trajectory.tools is None else _json(trajectory.tools, f"{where}: tools"),
        "metrics": _json(trajectory.metrics, f"{where}: metrics"),
        "metadata": _json(trajectory.metadata, f"{where}: metadata"),
    }


def write_parquet(path: str | Path, groups: Sequence[TrajectoryGroup], step: int) -> None:
    """Write the groups of `step` to `path`: under a temporary name, flushed, renamed. Missing
    folders are made.

    Raises DataError, naming the trajectory, for messages or metadata that are not JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        _row(step, g, i, trajectory)
        for g, group in enumerate(groups)
        for i, trajectory in enumerate(group.trajectories)
    ]
    about = {
        "schema": SCHEMA,
        "step": step,
        "rows": len(rows),
        "groups": [
            {"metadata": group.metadata, "exceptions": [failure.model_dump() for failure in group.exceptions]}
            for group in groups
        ],
    }
    said = _json(about, "what is said of the groups")
    table = pa.Table.from_pylist(rows, schema=_columns().with_metadata({_KEY: said, _DIGEST: _sha256(said)}))
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_parquet(path: str | Path) -> list[TrajectoryGroup]:
    """The groups that `write_parquet` wrote. Raises StoreError if the file is missing, damaged, or
    of another kind.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        metadata = table.schema.metadata or {}
        said = metadata.get(_KEY, b"{}").decode()
        if _DIGEST in metadata and metadata[_DIGEST].decode() != _sha256(said):
            raise StoreError(f"{path} is damaged: what it says of the groups was changed after it was written")
        return _groups(path, json.loads(said), table.to_pylist())
    except (OSError, ValueError, KeyError, IndexError, TypeError, pa.ArrowException) as error:
        raise StoreError(f"{path} is not a readable Parquet file of trajectories: {error}") from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _groups(path: str | Path, about: Any, rows: list[dict[str, Any]]) -> list[TrajectoryGroup]:
    if about.get("schema") != SCHEMA:
        raise StoreError(f"{path} has schema {about.get('schema')}, this version reads {SCHEMA}")
    if about.get("rows", len(rows)) != len(rows):  # Parquet's footer has no checksum; earlier files don't say
        raise StoreError(f"{path} is damaged: it has {len(rows)} trajectories, {about['rows']} were written")
    groups = [
        TrajectoryGroup(
            trajectories=[],
            exceptions=[RolloutFailure(**failure) for failure in group["exceptions"]],
            metadata=group["metadata"],
        )
        for group in about["groups"]
    ]
    for row in rows:
        groups[row["group"]].trajectories.append(_trajectory(row))
    return groups


def _trajectory(row: dict[str, Any]) -> Trajectory:
    items = [
        _join_choice(row["choices"][item["choice"]]) if set(item) == {"choice"} else item
        for item in json.loads(row["messages"])
    ]
    return Trajectory(
        messages_and_choices=items,
        tools=None if row["tools"] is None else json.loads(row["tools"]),
        reward=row["reward"],
        turn_rewards=row.get("turn_rewards"),  # files of earlier versions have none
        metrics=json.loads(row["metrics"]),
        metadata=json.loads(row["metadata"]),
    )
