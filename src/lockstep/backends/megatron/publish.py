"""Brings a step into the server and verifies that it is there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from lockstep.backends.megatron.colocated import give_gpu_to_server, make_room_for_weights, never_left_asleep
from lockstep.backends.megatron.probe import ProbeScores, check_finite
from lockstep.backends.megatron.run import Run
from lockstep.backends.megatron.verify import trained_scores, verify
from lockstep.config import deadlines
from lockstep.errors import (
    LockstepError,
    MismatchError,
    ServerError,
    ServerLostError,
    WeightsError,
)
from lockstep.inference.environment.install import find_runtime
from lockstep.inference.launch import launch
from lockstep.trainer.protocol import Load, Save, SyncAdapter, SyncWeights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lockstep.runs.store import RunCheckpoint


async def serve(run: Run, number: int) -> dict[str, float]:
    """Bring step `number`, which the trainer holds, into the server, verify that it is there, and retire what no rollout uses.

    In colocated mode the trainer has the device before and the server has it after, also after a verification that failed; after any other
    error that left it asleep it is ended. Returns what the sync took and what the verification saw (`probe.compare`).
    """
    async with never_left_asleep(run):
        trained = await _scores_before_it_leaves(run, number)
        figures = await _into_server(run, number)
        return figures | await _verify(run, number, trained)


async def publish_and_serve(
    run: Run, number: int, staged: Path, metrics: Mapping[str, float], trained: ProbeScores | None
) -> tuple[RunCheckpoint, dict[str, float]]:
    """`serve` for a step that was just trained, and its folder: (the published step, what `serve` returns).

    Merged weights take the place of what is served, so the step is published before. An adapter is served beside the others: it leaves the
    trainer's memory at once, and its folder is written and published while the server is verified. Whatever the sync or the verification
    raises, the step was trained, and is published. trained: the trainer's scores of the run's probe.
    """
    async with never_left_asleep(run):
        if run.settings.routes is not None:
            trained = None  # they were scored on other experts than the server will use
        if run.settings.merged:
            step, seconds = await _publish(run, number, staged, metrics)
            figures = await _into_server(run, number)
            return step, figures | await _verify(run, number, trained) | {"seconds_publish": seconds}
        try:
            figures = await _into_server(run, number)
        except BaseException:
            await _publish(run, number, staged, metrics)
            raise
        publishing = asyncio.create_task(_publish(run, number, staged, metrics))
        try:
            figures |= await _verify(run, number, trained)
        finally:
            step, seconds = await publishing
        return step, figures | {"seconds_publish": seconds}


async def _publish(run: Run, number: int, staged: Path, metrics: Mapping[str, float]) -> tuple[RunCheckpoint, float]:
    """The published step, and the seconds until it was. An adapter's folder is first written; merged weights' was by `train_step`."""
    started = time.monotonic()
    if not run.settings.merged:
        await run.trainer.call(Save(staged), deadline_s=deadlines.STEP_S)
    step = await asyncio.to_thread(run.store.publish, number, staged, metrics)
    run.trainer_ahead = False
    return step, time.monotonic() - started


async def _scores_before_it_leaves(run: Run, number: int) -> ProbeScores | None:
    """The trainer's scores of the probe, before anything reaches the server. With replay they wait for the server's routes.

    Raises TrainerError for a step that computes anything that is not finite.
    """
    if run.settings.routes is not None:
        return None
    assert run.probe is not None
    trained = await trained_scores(run, run.probe)
    remedy = f"delete {run.store.step(number).path} and register again, to go on from the step before"
    check_finite(run.name(number), trained, remedy)
    return trained


async def _into_server(run: Run, number: int) -> dict[str, float]:
    """The server, awake, holds the step. Returns what the sync took."""
    started = time.monotonic()
    if run.settings.merged:
        # Rollouts that are under way go on under the name they began with; each token says which weights made it.
        await run.server.keep_names([run.name(old) for old in sorted(run.kept(number) & run.served)])
    await make_room_for_weights(run)
    figures = await _sync(run, number)
    await give_gpu_to_server(run)
    run.served.add(number)
    return figures | {"seconds_sync": time.monotonic() - started}


async def _verify(run: Run, number: int, trained: ProbeScores | None) -> dict[str, float]:
    """The server computes what the trainer does; older steps that no rollout uses are retired. trained: the trainer's scores, if known."""
    started = time.monotonic()
    seen = await verify(run, number, trained)
    for old in sorted(run.served - run.kept(number)):
        if not run.settings.merged:
            await run.server.unload_adapter(run.name(old))
        run.served.discard(old)
    return seen | {"seconds_verify": time.monotonic() - started}


async def back_to_published(run: Run, step: int) -> None:
    """After a step that never got published: whatever trainer and server did with it, they stand at `step`, the last that was, again."""
    await run.trainer.call(Load(run.store.step(step).path), deadline_s=deadlines.STEP_S)
    unpublished = run.name(step + 1)  # no rollout was ever told its name
    if not run.settings.merged and unpublished in await run.server.models():
        await run.server.unload_adapter(unpublished)
    run.served.discard(step + 1)
    run.trainer_ahead = False


async def give_gpu_back(run: Run, error: BaseException) -> None:
    """After a step that failed with `error`, in colocated mode: the server serves the step of before again.

    Where that fails too the server is ended: asleep it would let requests wait for ever.
    """
    if not run.settings.colocated:
        return
    step = run.store.published()[-1]
    try:
        # Whatever the error says (a cancelled call says nothing), the trainer may have changed its weights.
        await back_to_published(run, step)
        if run.settings.merged:
            await make_room_for_weights(run)
            await _sync(run, step)
        await give_gpu_to_server(run)
    except LockstepError as another:
        await run.server.close()
        error.add_note(f"the server could not go on with {run.name(step)} and was ended: {another}")


async def _sync(run: Run, number: int) -> dict[str, float]:
    """Step `number` from the trainer's memory into the server: merged weights, which from then on are what it serves, or an adapter.

    A server that was lost on the way is started anew. Raises ServerError, WeightsError or MismatchError; the server then serves what it
    served before, but a merged one in colocated mode is ended.
    """
    try:
        return await _send(run, number)
    except (ServerError, WeightsError, MismatchError) as error:
        lost = isinstance(error, ServerLostError) or run.server.child.poll() is not None
        if run.settings.colocated and (run.settings.merged or lost):
            await run.server.close()
            left = "was lost" if lost else "held no weights any more and was ended"  # asleep it forgot those of before
        elif lost:
            await _start_server_again(run, number)
            return await _send(run, number) | {"server_restarts": 1.0}
        else:
            left = f"still serves {_newest(run)}"
            await give_gpu_to_server(run)
        raise type(error)(
            f"{run.name(number)} did not reach the server, which {left}: {error}; "
            "close the backend and register again to go on from the last published step"
        ) from error


def _newest(run: Run) -> str:
    """The newest of the model's steps that the server holds; at the start it holds the base model only."""
    if run.settings.merged or not run.served:
        return run.server.served_name
    return run.name(max(run.served))


async def _send(run: Run, number: int) -> dict[str, float]:
    transport, name = run.settings.transport, run.name(number)
    kind = SyncWeights if run.settings.merged else SyncAdapter
    asked = kind(
        root_url=run.server.root_url,
        version=name,
        transport=f"disk:{run.store.path.resolve() / 'weights'}" if transport == "disk" else transport,
        deadline_s=deadlines.SYNC_S,
        api_key=run.server.api_key,
    )
    report = await run.trainer.call(asked, deadline_s=deadlines.STEP_S)
    if run.settings.merged:
        run.server.served_name = name
    return {
        "sync_bytes": float(report.nbytes),
        "seconds_sync_transfer": report.transfer_s,
        "seconds_sync_pause": report.pause_s,
        "verified_identity": float(report.compared),
    }


async def _start_server_again(run: Run, number: int) -> None:
    """In the place of one that died, or that was ended half-way through a swap: rollouts have to begin again, at a new address.

    Adapters of older steps that they may ask for come from their folders: the trainer's memory has step `number` only.
    """
    older = () if run.settings.merged else run.kept(number) & run.served
    await run.server.close()
    await run.model._disconnect()
    run.settings = replace(run.settings, server_start=run.store.next_server_start())
    config = run.settings.server_config(f"{run.model.name}@base")
    run.server = await launch(config, find_runtime(run.settings.devices.kind), run.store.path)
    run.served.clear()
    for old in sorted(older):
        await run.server.load_adapter(run.name(old), run.store.step(old).adapter)
        run.served.add(old)
