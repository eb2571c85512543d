"""Brings a step into the server and verifies that it is there; publishes it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lockstep.backends.megatron.probe import ProbeScores, check_finite
from lockstep.backends.megatron.recovery import go_on_without_lost, sync
from lockstep.backends.megatron.run import Run
from lockstep.backends.megatron.verify import trained_scores, verify
from lockstep.errors import ServerError, TrainerLostError
from lockstep.metrics.spans import span

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lockstep.backends.base import Attach


async def serve(run: Run, number: int) -> dict[str, float]:
    """Bring step `number`, which the trainer holds, into the server, verify it there, and retire
    what no rollout uses.

    Colocated, the trainer has the device before, and the server has the device after, even after a
    failed verification. After any other error that left the server asleep, the server is ended.
    Returns what the sync took and what the verification saw (`probe.compare`).
    """
    async with run.gpus.never_left_asleep():
        trained = await _scores_before_it_leaves(run, number)
        figures = await _into_server(run, number)
        return figures | await _verify(run, number, trained)


@dataclass(frozen=True)
class StagedStep:
    """A step that was trained and not published.

    staged: its folder, under a temporary name.
    job: that makes the step; the publication ends it.
    attach: adds to the folder before it is published.
    """

    number: int
    staged: Path
    metrics: Mapping[str, float]
    job: str
    attach: Attach | None = None


async def publish_and_serve(run: Run, step: StagedStep, trained: ProbeScores | None) -> dict[str, float]:
    """`serve` for a step that was just trained, and its folder; returns what `serve` returns.

    Merged weights replace the served ones, so the checkpoint is published first. An adapter is
    served beside the others. It leaves the trainer's memory first; its folder is written and
    published while the server is verified. Whatever the sync or the verification raises, the step
    was trained, and is published; but for a trainer that was lost before.

    trained: the trainer's scores of the run's probe.
    """
    number = step.number
    async with run.gpus.never_left_asleep():
        if run.settings.routed_experts is not None:
            trained = None  # they were scored on other experts than the server will use
        if run.delivery.replaces:
            seconds = await _publish(run, step)
            figures = await _into_server(run, number)
            return figures | await _verify(run, number, trained) | {"seconds_publish": seconds}
        try:
            figures = await _into_server(run, number)
        except TrainerLostError:  # nobody is left to write the step
            raise
        except BaseException:
            await _publish(run, step)
            raise
        publishing = asyncio.create_task(_publish(run, step))
        try:
            figures |= await _verify(run, number, trained)
        finally:
            seconds = await publishing
        return figures | {"seconds_publish": seconds}


async def _publish(run: Run, step: StagedStep) -> float:
    """The seconds until the step was published."""
    started = time.monotonic()
    await run.delivery.write(step.staged)
    state = await step.attach(step.staged) if step.attach else None
    await asyncio.to_thread(run.store.publish, step.number, step.staged, step.metrics, state, step.job)
    run.trainer_ahead = False
    return time.monotonic() - started


async def _scores_before_it_leaves(run: Run, number: int) -> ProbeScores | None:
    """The trainer's scores of the probe, before anything reaches the server. With replay they wait
    for the server's routed experts.

    Raises TrainerError for a step that computes anything that is not finite.
    """
    if run.settings.routed_experts is not None:
        return None
    assert run.probe is not None
    trained = await trained_scores(run, run.probe)
    remedy = f"delete {run.store.step(number).path} and register again, to go on from the step before"
    check_finite(run.name(number), trained, remedy)
    return trained


async def _into_server(run: Run, number: int) -> dict[str, float]:
    """The server, awake, holds the step. Returns what the sync took."""
    started = time.monotonic()
    with span(run.store.path, "sync", number):
        await run.on_servers(lambda server: run.delivery.before_sync(server, number))
        await run.gpus.make_room_for_weights()
        figures = await sync(run, number)
        await run.gpus.give_to_server()
    run.served.add(number)
    return figures | {"seconds_sync": time.monotonic() - started}


async def _verify(run: Run, number: int, trained: ProbeScores | None) -> dict[str, float]:
    """The server computes what the trainer does; older steps that no rollout uses are retired.

    trained: the trainer's scores, if known.
    """
    started = time.monotonic()
    with span(run.store.path, "verify", number):
        try:
            seen = await verify(run, number, trained)
        except ServerError:
            restarted = await go_on_without_lost(run, number)
            if restarted is None:
                raise
            seen = await verify(run, number, trained) | restarted
        for old in sorted(run.served - run.kept(number)):
            await run.delivery.retire(old)
            run.served.discard(old)
    return seen | {"seconds_verify": time.monotonic() - started}
