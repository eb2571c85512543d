"""Brings a step into the server and proves that it is there.

Shape suffixes: S tokens, L layers, K experts per token.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from lockstep.backends import run as deadlines
from lockstep.backends.probe import ProbeScores
from lockstep.backends.run import STEP_DEADLINE_S, Run
from lockstep.backends.turns import make_room_for_weights, never_left_asleep, servers_turn, trainers_turn
from lockstep.errors import (
    LockstepError,
    MismatchError,
    ServerError,
    ServerLostError,
    WeightsError,
)
from lockstep.serving.client import most_likely
from lockstep.serving.install import find_runtime
from lockstep.serving.launch import launch
from lockstep.tokens.batch import unpack_scores
from lockstep.tokens.pack import pack, save_batch
from lockstep.tokens.routes import decode_routes
from lockstep.tokens.top import TOP
from lockstep.tokens.tree import scoring_sequence

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lockstep.store import Step


async def serve(run: Run, number: int) -> dict[str, float]:
    """Bring step `number`, which the trainer holds, into the server, prove that it is there, and retire what no rollout uses.

    In shared mode the trainer has the device before and the server has it after, also after a failed proof; after any other error that
    left it asleep it is ended. Returns what the sync took and what the probe found (`Probe.compare`).
    """
    async with never_left_asleep(run):
        return await _serve(run, number)


async def _serve(run: Run, number: int) -> dict[str, float]:
    trained, figures = await _into_server(run, number)
    return figures | await _prove(run, number, trained)


async def publish_and_serve(
    run: Run, number: int, staged: Path, metrics: Mapping[str, float]
) -> tuple[Step, dict[str, float]]:
    """`serve` for a step that was just trained, and its folder: (the published step, what `serve` returns).

    Merged weights take the place of what is served, so the step is published before. An adapter is served beside the others: it leaves the
    trainer's memory at once, and its folder is written and published while the server is proved. Whatever the sync or the proof raises,
    the step was trained, and is published.
    """
    async with never_left_asleep(run):
        if run.parts.merged:
            step, seconds = await _publish(run, number, staged, metrics)
            return step, await _serve(run, number) | {"seconds_publish": seconds}
        try:
            trained, figures = await _into_server(run, number)
        except BaseException:
            await _publish(run, number, staged, metrics)
            raise
        publishing = asyncio.create_task(_publish(run, number, staged, metrics))
        try:
            figures |= await _prove(run, number, trained)
        finally:
            step, seconds = await publishing
        return step, figures | {"seconds_publish": seconds}


async def _publish(run: Run, number: int, staged: Path, metrics: Mapping[str, float]) -> tuple[Step, float]:
    """The published step, and the seconds until it was. An adapter's folder is first written; merged weights' was by `train_step`."""
    started = time.monotonic()
    if not run.parts.merged:
        await run.trainer.call("save", {"out": str(staged)}, deadline_s=STEP_DEADLINE_S)
    step = await asyncio.to_thread(run.store.publish, number, staged, metrics)
    run.trainer_ahead = False
    return step, time.monotonic() - started


async def _into_server(run: Run, number: int) -> tuple[ProbeScores | None, dict[str, float]]:
    """The server, awake, holds the step: (the trainer's scores of the probe where they had to come first, what the sync took)."""
    started = time.monotonic()
    # Before the trainer's memory leaves the device; with replay its score has to wait for the server's routes.
    early = run.parts.shared and not run.parts.routes
    trained = await _score(run, list(run.probe.tokens), None) if early else None
    if run.parts.merged:
        # Rollouts that are under way go on under the name they began with; each token says which weights made it.
        await run.server.keep_names([run.name(old) for old in sorted(run.kept(number) & run.served)])
    await make_room_for_weights(run)
    figures = await _sync(run, number)
    await servers_turn(run)
    run.served.add(number)
    return trained, figures | {"seconds_sync": time.monotonic() - started}


async def _prove(run: Run, number: int, trained: ProbeScores | None) -> dict[str, float]:
    """The server computes what the trainer does; older steps that no rollout uses are retired. trained: the trainer's scores, if known."""
    tokens = list(run.probe.tokens)
    logprobs, choice = await run.server.score_choice(run.name(number), tokens, TOP)
    if trained is None:
        await trainers_turn(run, forget_weights=False)
        trained = await _score(run, tokens, _probe_routes(run, choice))
        await servers_turn(run)
    served = ProbeScores(logprobs, np.array(most_likely(choice, TOP)))
    found = run.probe.compare(run.name(number), served, trained, run.server.child.log_path)
    for old in sorted(run.served - run.kept(number)):
        if not run.parts.merged:
            await run.server.unload_adapter(run.name(old))
        run.served.discard(old)
    return found


async def back_to_published(run: Run, step: int) -> None:
    """After a step that never got published: whatever trainer and server did with it, they stand at `step`, the last that was, again."""
    await run.trainer.call("load", {"step_dir": str(run.store.step(step).path)}, deadline_s=STEP_DEADLINE_S)
    unpublished = run.name(step + 1)  # no rollout was ever told its name
    if not run.parts.merged and unpublished in await run.server.models():
        await run.server.unload_adapter(unpublished)
    run.served.discard(step + 1)
    run.trainer_ahead = False


async def give_up_turn(run: Run, error: BaseException) -> None:
    """After a step that failed with `error`, in shared mode: the server serves the step of before again.

    Where that fails too the server is ended: asleep it would let requests wait for ever.
    """
    if not run.parts.shared:
        return
    step = run.store.published()[-1]
    try:
        # Whatever the error says (a cancelled call says nothing), the trainer may have changed its weights.
        await back_to_published(run, step)
        if run.parts.merged:
            await make_room_for_weights(run)
            await _sync(run, step)
        await servers_turn(run)
    except LockstepError as another:
        await run.server.close()
        error.add_note(f"the server could not go on with {run.name(step)} and was ended: {another}")


async def _sync(run: Run, number: int) -> dict[str, float]:
    """Step `number` from the trainer's memory into the server: merged weights, which from then on are what it serves, or an adapter.

    A server that was lost on the way is started anew. Raises ServerError, WeightsError or MismatchError; the server then serves what it
    served before, but a merged one in shared mode is ended.
    """
    try:
        return await _send(run, number)
    except (ServerError, WeightsError, MismatchError) as error:
        lost = isinstance(error, ServerLostError) or run.server.child.poll() is not None
        if run.parts.shared and (run.parts.merged or lost):
            await run.server.close()
            left = "was lost" if lost else "held no weights any more and was ended"  # asleep it forgot those of before
        elif lost:
            await _start_server_again(run, number)
            return await _send(run, number) | {"server_restarts": 1.0}
        else:
            left = f"still serves {_newest(run)}"
            await servers_turn(run)
        raise type(error)(
            f"{run.name(number)} did not reach the server, which {left}: {error}; "
            "close the backend and register again to go on from the last published step"
        ) from error


def _newest(run: Run) -> str:
    """The newest of the model's steps that the server holds; at the start it holds the base model only."""
    if run.parts.merged or not run.served:
        return run.server.served_name
    return run.name(max(run.served))


async def _send(run: Run, number: int) -> dict[str, float]:
    transport, name = run.parts.transport, run.name(number)
    arguments = {
        "root_url": run.server.root_url,
        "version": name,
        "transport": f"disk:{run.store.path.resolve() / 'weights'}" if transport == "disk" else transport,
        "deadline_s": deadlines.SYNC_DEADLINE_S,
    }
    verb = "sync" if run.parts.merged else "sync_adapter"
    secret = {"api_key": run.server.api_key}
    reply = await run.trainer.call(verb, arguments, deadline_s=STEP_DEADLINE_S, secret=secret)
    if run.parts.merged:
        run.server.served_name = name
    return {
        "sync_bytes": float(reply["nbytes"]),
        "seconds_sync_transfer": reply["transfer_s"],
        "seconds_sync_pause": reply["pause_s"],
    }


async def _start_server_again(run: Run, number: int) -> None:
    """In the place of one that died, or that was ended half-way through a swap: rollouts have to begin again, at a new address.

    Adapters of older steps that they may ask for come from their folders: the trainer's memory has step `number` only.
    """
    older = () if run.parts.merged else run.kept(number) & run.served
    await run.server.close()
    await run.model._disconnect()
    config = run.parts.server_config(f"{run.model.name}@base")
    run.server = await launch(config, find_runtime(run.parts.devices.kind), run.store.path)
    run.served.clear()
    for old in sorted(older):
        await run.server.load_adapter(run.name(old), run.store.step(old).adapter)
        run.served.add(old)


async def _score(run: Run, tokens: list[int], routes_SLK: np.ndarray | None) -> ProbeScores:
    """What the trainer computes for these tokens, on the experts that the server used."""
    batch_path, out = (run.store.path / "batches" / name for name in ("probe.safetensors", "probe-scores.safetensors"))
    sequence = scoring_sequence("probe", tokens, routes_SLK)
    batch = pack([sequence], np.zeros(1), np.ones(1), data=run.parts.parallel.data)
    await asyncio.to_thread(save_batch, batch, batch_path)
    arguments = {"batch": str(batch_path), "out": str(out), "top": TOP}
    await run.trainer.call("score", arguments, deadline_s=STEP_DEADLINE_S)
    scores = await asyncio.to_thread(load_file, out)
    logprobs, top_TV = (unpack_scores(batch, scores[name])[0] for name in ("logprobs_RS", "top_RSC"))
    return ProbeScores([float(value) for value in logprobs], top_TV)


def _probe_routes(run: Run, choice: dict[str, Any]) -> np.ndarray | None:
    """The experts the server used for the probe; None where none are captured."""
    if run.parts.routes is None:
        return None
    given = (choice.get("routed_experts"), choice.get("routes_digest"))
    return decode_routes(*given, choice["prompt_token_ids"], choice["token_ids"], run.parts.routes, "the probe")
