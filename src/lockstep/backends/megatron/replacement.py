"""Several servers: one that is lost is replaced beside the rollouts, which the others go on serving.

The new server gets the published step from the trainer's memory and is verified. Only then do
requests reach it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lockstep.backends.megatron.jobs import job
from lockstep.backends.megatron.recovery import new_server, replace_lost_server
from lockstep.backends.megatron.run import Run
from lockstep.backends.megatron.verify import verify
from lockstep.config import deadlines
from lockstep.errors import LockstepError
from lockstep.trainer.protocol import Load

_LOG = logging.getLogger(__name__)


async def keep_replicas(run: Run, note: Callable[[str], None]) -> None:
    """Look after the servers until this task is cancelled.

    note: called when a server can't be replaced. The run goes on with those that are left.
    """
    failures = 0
    while failures <= len(deadlines.TRAINER_PAUSES_S):
        await asyncio.sleep(deadlines.LOOK_S)
        if not await _look(run):
            continue
        try:
            async with run.training:
                await mend(run)
            failures = 0
        except LockstepError as error:
            failures += 1
            said = str(error).splitlines()[0].removesuffix(":")
            if failures > len(deadlines.TRAINER_PAUSES_S):
                note(f"{run.model.name} goes on with {len(run.servers)} of {run.replicas} servers: {said}")
                return
            _LOG.warning("no server could take the place of a lost one: %s", said)
            await asyncio.sleep(deadlines.TRAINER_PAUSES_S[failures - 1])


async def _look(run: Run) -> bool:
    """Whether a server has to be replaced; a lost one gets no requests any more, if another lives."""
    for server in tuple(run.servers):
        await run.left_out(server)
    return len(run.servers) < run.replicas or (len(run.servers) == 1 and bool(await run.server.problem()))


async def mend(run: Run) -> bool:
    """Start, load and verify a server in the place of each that was lost. Returns whether one was.
    The caller holds `run.training`.

    Raises LockstepError where a new server can't take the step.
    """
    if not await _look(run):
        return False
    step = run.model.step
    async with job(run, "restarted_sync", step, f"after server {run.settings.server_start}"):
        # The trainer may hold a step that failed; the new server gets the published one.
        if run.trainer_ahead and not run.settings.colocated:
            await run.trainer.call(Load(run.store.step(step).path), deadline_s=deadlines.STEP_S)
        metrics = await replace_lost_server(run, step)
        if metrics is not None:
            metrics |= await verify(run, step, None)
        taken = {server.replica for server in run.servers}
        for replica in sorted(set(range(run.replicas)) - taken):
            metrics = await _joined(run, replica, step)
        await asyncio.to_thread(run.store.record, step, metrics or {})
    return True


async def _joined(run: Run, replica: int, step: int) -> dict[str, float]:
    """A new server in this place, verified; returns the figures of its sync and verification."""
    server, figures = await new_server(run, replica, step)
    try:
        figures |= await verify(run, step, None, [server])
    except BaseException:
        await server.close()
        raise
    run.servers.append(server)
    run.servers.sort(key=lambda server: server.replica)
    _LOG.warning("%s serves %s again, verified", server.child.name, run.name(step))
    return figures
