"""A trainer that is lost in a step is started anew from the last published one.

That happens a few times, and ever more slowly.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from lockstep.backends.megatron.jobs import job
from lockstep.backends.megatron.launch import start_both, start_trainer
from lockstep.backends.megatron.publish import serve
from lockstep.backends.megatron.run import Run, all_ended
from lockstep.config import deadlines
from lockstep.errors import ServerLostError, TrainerLostError
from lockstep.inference.environment.install import find_runtime
from lockstep.trainer.protocol import Load

_LOG = logging.getLogger(__name__)
Metrics = dict[str, float]


async def survived(run: Run, number: int, step: Callable[[], Awaitable[Metrics]]) -> Metrics:
    """`step` makes, publishes and serves step `number`, and returns its metrics. Where the trainer
    is lost on the way, `step` begins again.

    A step that was published before the trainer was lost is not made again, only served. Raises
    TrainerLostError once the pauses are used up.
    """
    pauses_s = deadlines.TRAINER_PAUSES_S
    for restarts in range(len(pauses_s) + 1):
        try:
            if restarts:
                await asyncio.sleep(pauses_s[restarts - 1])
                await _start_again(run)
            if restarts and run.store.published()[-1] == number:
                async with job(run, "restarted_sync", number, f"trainer {restarts}"):
                    metrics = run.store.metrics()[number] | await serve(run, number)
            else:
                metrics = await step()
            return metrics | {"trainer_restarts": float(restarts)} if restarts else metrics
        except TrainerLostError as error:
            if restarts == len(pauses_s):
                raise TrainerLostError(
                    f"the trainer was lost {restarts + 1} times in step {number}, last: {error}; the same command goes on from "
                    f"{run.name(run.store.published()[-1])}"
                ) from error
            said = str(error).splitlines()[0].removesuffix(":")
            _LOG.warning("%s; starting it anew in %g s", said, pauses_s[restarts])
    raise AssertionError("the last attempt returns or raises")


async def registered(start: Callable[[], Awaitable[int]]) -> int:
    """What `start` returns: the step that trainer and server hold. Where either is lost on the way,
    `start` begins again, once.

    Raises TrainerLostError or ServerLostError, which name the end, after that.
    """
    for pause_s in (*deadlines.TRAINER_PAUSES_S[:1], None):
        try:
            return await start()
        except (TrainerLostError, ServerLostError) as error:
            if pause_s is None:
                raise
            _LOG.warning("%s; beginning again in %g s", str(error).splitlines()[0].removesuffix(":"), pause_s)
            await asyncio.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


async def _start_again(run: Run) -> None:
    """A new trainer, which holds the last published step. Colocated, the server begins again too:
    the two can't start beside each other.

    What the server was sent of a step that is not published is withdrawn when the next one begins.
    """
    if run.settings.colocated:
        await all_ended(run.trainer.close(), run.server.close())  # a colocated run has one
        await run.model._disconnect()
        run.settings = replace(run.settings, server_start=run.store.next_server_start())
        runtime, name = find_runtime(run.settings.devices.kind), f"{run.model.name}@base"
        run.trainer, run.servers = await start_both(run.settings, name, runtime, run.store.path, _LOG.info)
        run.served.clear()
        await run.gpus.give_to_trainer(forget_weights=run.delivery.replaces)
    else:
        await run.trainer.close()
        run.trainer = await start_trainer(run.settings, run.store.path)
    latest = run.store.step(run.store.published()[-1])
    await run.trainer.call(Load(latest.path), deadline_s=deadlines.STEP_S)
    if run.settings.colocated and latest.number == run.model.step:
        await serve(run, latest.number)
