"""After a failure: trainer and server go back to the last published step, and a server that was
lost is started again.
"""

from __future__ import annotations

from dataclasses import replace

from lockstep.backends.megatron.launch import start_server
from lockstep.backends.megatron.run import Run
from lockstep.config import deadlines
from lockstep.errors import LockstepError, MismatchError, ServerError, ServerLostError, WeightsError
from lockstep.inference.environment.install import find_runtime
from lockstep.trainer.protocol import Load


async def back_to_published(run: Run, step: int) -> None:
    """Roll trainer and server back to checkpoint `step` after a step that was not published."""
    await run.trainer.call(Load(run.store.step(step).path), deadline_s=deadlines.STEP_S)
    await run.delivery.withdraw(step + 1)
    run.served.discard(step + 1)
    run.trainer_ahead = False


async def give_gpu_back(run: Run, error: BaseException) -> None:
    """After a step that failed with `error`, colocated: the server serves the step of before again.

    Where that fails too the server is ended: asleep it would let requests wait for ever.
    """
    if not run.settings.colocated:
        return
    step = run.store.published()[-1]
    try:
        # Whatever the error says (a cancelled call says nothing), the trainer may have changed its
        # weights.
        await back_to_published(run, step)
        if run.delivery.replaces:
            await run.gpus.make_room_for_weights()
            await sync(run, step)
        await run.gpus.give_to_server()
    except LockstepError as another:
        await run.server.close()
        error.add_note(f"the server could not go on with {run.name(step)} and was ended: {another}")


async def sync(run: Run, number: int) -> dict[str, float]:
    """Step `number` from the trainer's memory into the server. A server that was lost on the way is
    started anew.

    Raises ServerError, WeightsError or MismatchError; the server then serves what it served before,
    but a colocated server of merged weights is ended.
    """
    try:
        return await _send(run, number)
    except (ServerError, WeightsError, MismatchError) as error:
        lost = isinstance(error, ServerLostError) or bool(await run.server.problem())
        if run.settings.colocated and (run.delivery.replaces or lost):
            await run.server.close()
            left = "was lost" if lost else "held no weights any more and was ended"  # asleep it forgot those of before
        elif lost:
            return await _on_a_new_server(run, number)
        else:
            left = f"still serves {run.delivery.served()}"
            await run.gpus.give_to_server()
        raise type(error)(
            f"{run.name(number)} did not reach the server, which {left}: {error}; "
            "close the backend and register again to go on from the last published step"
        ) from error


async def replace_lost_server(run: Run, number: int) -> dict[str, float] | None:
    """Start a new server with step `number`, which the trainer holds, if the server was lost.
    Returns what the sync took; None if the server lives.

    Raises ServerError in colocated mode: the trainer has the device then, so the run has to be
    registered again.
    """
    problem = await run.server.problem()
    if not problem:
        return None
    if run.settings.colocated:
        await run.server.close()
        raise ServerError(f"the server was lost: {problem}; close the backend and register again to go on")
    return await _on_a_new_server(run, number)


async def _on_a_new_server(run: Run, number: int) -> dict[str, float]:
    await _start_server_again(run, number)
    figures = await _send(run, number) | {"server_restarts": 1.0}
    run.served.add(number)
    return figures


async def _send(run: Run, number: int) -> dict[str, float]:
    transport, name = run.settings.transport, run.name(number)
    request = run.delivery.request(
        root_url=run.server.root_url,
        version=name,
        transport=f"disk:{run.store.path.resolve() / 'weights'}" if transport == "disk" else transport,
        deadline_s=deadlines.SYNC_S,
        api_key=run.server.api_key,
    )
    report = await run.trainer.call(request, deadline_s=deadlines.STEP_S)
    run.delivery.arrived(name)
    return {
        "sync_bytes": float(report.nbytes),
        "seconds_sync_transfer": report.transfer_s,
        "seconds_sync_pause": report.pause_s,
        "verified_identity": float(report.compared),
    }


async def _start_server_again(run: Run, number: int) -> None:
    """Start a server in place of a dead one, or of one that was ended half-way through a swap.
    Rollouts begin again, at a new address.

    Adapters of older steps that they may ask for come from their folders: the trainer's memory has
    step `number` only.
    """
    older = run.delivery.older(number)
    await run.server.close()
    await run.model._disconnect()
    run.settings = replace(run.settings, server_start=run.store.next_server_start())
    config = run.settings.server_config(f"{run.model.name}@base")
    run.server = await start_server(run.settings, config, find_runtime(run.settings.devices.kind), run.store.path)
    run.served.clear()
    for old in sorted(older):
        await run.server.load_adapter(run.name(old), run.store.step(old).adapter)
        run.served.add(old)
