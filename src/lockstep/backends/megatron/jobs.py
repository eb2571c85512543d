"""A job around what the backend does for a run: its row says what is under way, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from lockstep.backends.megatron.run import Run
from lockstep.errors import StoreError
from lockstep.runs.jobs import Kind

_EVERY_S = 1.0
"""Between two signs of life in the file."""
_LONGEST = 2000
"""Characters of an error that are kept."""


@asynccontextmanager
async def job(run: Run, kind: Kind, step: int, digest: str) -> AsyncIterator[str]:
    """Submit and claim a job, and end its row with what happens inside: yields its id.

    digest: of the input. A step's job is done when the step is published, whatever comes after.
    """
    jobs = run.store.jobs
    submitted = await asyncio.to_thread(jobs.submit, step, kind, digest)
    if submitted.state == "done":
        raise StoreError(f"job {submitted.id} is done: step {step} was made from this very batch")
    await asyncio.to_thread(jobs.claim, submitted.id)
    written = 0.0

    async def beat(phase: str, waits_for: str) -> None:
        nonlocal written
        if time.monotonic() - written >= _EVERY_S:
            written = time.monotonic()
            with suppress(StoreError):  # a disk that is full for a moment must not end a step
                await asyncio.to_thread(jobs.beat, submitted.id, phase, waits_for)

    run.trainer.on_beat = beat
    try:
        yield submitted.id
    except BaseException as error:  # not awaited: a second Ctrl-C would leave the row running
        jobs.fail(submitted.id, type(error).__name__, (str(error).splitlines() or [""])[0][:_LONGEST])
        raise
    else:
        await asyncio.to_thread(jobs.finish, submitted.id)
    finally:
        run.trainer.on_beat = None
