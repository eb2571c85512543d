"""After a failure: trainer and server go back to the last published step, and a server that was
lost is started again.
"""

from __future__ import annotations

from dataclasses import replace

from lockstep.backends.megatron.launch import start_server
from lockstep.backends.megatron.run import Run
from lockstep.config import deadlines
from lockstep.errors import LockstepError, MismatchError, ServerError, ServerLostError, WeightsError
from lockstep.inference.client import Server
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

    Of several servers, one that does not take the step is ended, if another takes it.

    Raises ServerError, WeightsError or MismatchError; the server then serves what it served before,
    but a colocated server of merged weights is ended.
    """
    figures, refused = [], []
    for server in tuple(run.servers):
        try:
            figures.append(await _send(run, server, number))
        except (ServerError, WeightsError, MismatchError) as error:
            refused.append((server, error))
    if figures:
        for server, error in refused:
            await run.end_server(server, f"{run.name(number)} did not reach {server.child.name}: {error}")
        return _together(figures)
    for server, _ in refused:
        await run.left_out(server)
    return await _without(run, number, dict(refused)[run.server])


def _together(figures: list[dict[str, float]]) -> dict[str, float]:
    """What the syncs of all servers took, one after another."""
    total = {name: sum(each[name] for each in figures) for name in figures[0]}
    return total | {
        "seconds_sync_pause": max(each["seconds_sync_pause"] for each in figures),
        "verified_identity": min(each["verified_identity"] for each in figures),
    }


async def _without(run: Run, number: int, error: LockstepError) -> dict[str, float]:
    """After a sync that reached no server: a lost server begins anew with step `number`, else `error`
    is raised.
    """
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


async def go_on_without_lost(run: Run, number: int) -> dict[str, float] | None:
    """After a call that failed: leave lost servers out, or replace the last one. Returns what its sync
    took; None if no server was lost.
    """
    before = len(run.servers)
    for server in tuple(run.servers):
        await run.left_out(server)
    return {} if len(run.servers) < before else await replace_lost_server(run, number)


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
    """A server in place of a dead one, or of one that was ended half-way through a swap. Rollouts
    begin again, at a new address.
    """
    older = run.delivery.older(number)
    await run.server.close()
    if run.replicas == 1:  # else the client finds the new address
        await run.model._disconnect()
    run.served &= older
    run.servers[0], figures = await new_server(run, run.server.replica, number)
    run.served.add(number)
    return figures


async def new_server(run: Run, replica: int, number: int) -> tuple[Server, dict[str, float]]:
    """A new server in this place with step `number`, which the trainer holds, and what its sync took.

    Adapters of older steps that rollouts may ask for come from their folders: the trainer's memory
    has step `number` only.
    """
    run.settings = replace(run.settings, server_start=run.store.next_server_start())
    runtime, name = find_runtime(run.settings.devices.kind), f"{run.model.name}@base"
    server = await start_server(run.settings, name, runtime, run.store.path, replica=replica)
    try:
        for old in sorted(run.delivery.older(number)):
            await server.load_adapter(run.name(old), run.store.step(old).adapter)
        if number in run.served:
            await run.delivery.before_sync(server, number)
        return server, await _send(run, server, number) | {"server_restarts": 1.0}
    except BaseException:
        await server.close()
        raise


async def _send(run: Run, server: Server, number: int) -> dict[str, float]:
    transport, name = run.settings.transport, run.name(number)
    request = run.delivery.request(
        root_url=server.root_url,
        version=name,
        transport=f"disk:{run.store.path.resolve() / 'weights'}" if transport == "disk" else transport,
        deadline_s=deadlines.SYNC_S,
        api_key=server.api_key,
        others=tuple(other.root_url for other in run.servers if other is not server),
    )
    report = await run.trainer.call(request, deadline_s=deadlines.STEP_S)
    run.delivery.arrived(server, name)
    return {
        "sync_bytes": float(report.nbytes),
        "seconds_sync_transfer": report.transfer_s,
        "seconds_sync_pause": report.pause_s,
        "verified_identity": float(report.compared),
    }
