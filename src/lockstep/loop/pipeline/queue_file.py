"""The asynchronous loop's part of a checkpoint: what is drawn, what is ready, and what the step was
trained on.

The manifest's state names the draws. The step's folder holds the ready groups as Parquet. Groups
under way begin again after a start, with the seeds they had.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.errors import StoreError
from lockstep.loop.pipeline.group_queue import Draw, GroupQueue, Ready
from lockstep.rollouts.parquet import read_parquet, write_parquet
from lockstep.runs.checkpoint import read_manifest
from lockstep.runs.store import folder_name

FILE = "queue.parquet"
_KEY = "pipeline"
_SCHEMA = 1


async def attach_queue(folder: Path, step: int, queue: GroupQueue, trained: Sequence[Draw]) -> dict[str, Any]:
    """Write the ready groups into the folder of `step`; returns the state for its manifest.

    trained: the draws of the step's groups.
    """
    ready = [queue.ready[number] for number in sorted(queue.ready)]
    state = {
        "schema": _SCHEMA,
        "position": queue.position,
        "number": queue.number,
        "begun": [_fields(draw) for draw in (*queue.under_way.values(), *queue.again)],
        "ready": [{**_fields(each.draw), "oldest": each.oldest, "seconds": each.seconds} for each in ready],
        "trained": [_fields(draw) for draw in trained],
    }
    groups = [each.group for each in ready]  # all of one moment, as the state is
    await asyncio.to_thread(write_parquet, folder / FILE, groups, step)
    return {_KEY: state}


def restore_queue(run_path: Path, step: int, queue: GroupQueue) -> None:
    """Fill a new queue with what the checkpoint of `step` holds; one of the synchronous loop holds
    nothing, and the order goes on behind its scenarios.

    Raises StoreError for a queue that this version does not read.
    """
    folder = run_path / "steps" / folder_name(step)
    state: Mapping[str, Any] | None = read_manifest(folder)["state"].get(_KEY)
    if state is None:
        queue.position = step * queue.size
        return
    if state.get("schema") != _SCHEMA:
        raise StoreError(f"{folder} has a queue of schema {state.get('schema')}, this version reads {_SCHEMA}")
    queue.position, queue.number = state["position"], state["number"]
    queue.again = [_draw(fields) for fields in state["begun"]]
    groups = read_parquet(folder / FILE)
    for fields, group in zip(state["ready"], groups, strict=True):
        ready = Ready(_draw(fields), group, fields["oldest"], fields["seconds"])
        queue.ready[ready.draw.number] = ready


def _fields(draw: Draw) -> dict[str, int]:
    return {"number": draw.number, "position": draw.position, "attempt": draw.attempt}


def _draw(fields: Mapping[str, Any]) -> Draw:
    return Draw(fields["number"], fields["position"], fields["attempt"])
