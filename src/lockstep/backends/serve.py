"""Brings a step into the server and proves that it is there.

Shape suffixes: S tokens, L layers, K experts per token.
"""

from __future__ import annotations

import asyncio
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
    from lockstep.store import Step


async def serve(run: Run, step: Step) -> dict[str, float]:
    """Bring `step`, which the trainer holds, into the server, prove that it is there, and retire what no rollout uses.

    In shared mode the trainer has the device before and the server has it after, also after a failed proof; after any other error that
    left it asleep it is ended. Returns what the probe found (`Probe.compare`) and what a merged sync took.
    """
    async with never_left_asleep(run):
        return await _serve(run, step)


async def _serve(run: Run, step: Step) -> dict[str, float]:
    name = run.name(step.number)
    tokens = list(run.probe.tokens)
    # Before the trainer's memory leaves the device; with replay its score has to wait for the server's routes.
    trained = None if run.parts.routes else await _score(run, tokens, None)
    figures = await _into_server(run, step)
    logprobs, choice = await run.server.score_choice(name, tokens, TOP)
    if trained is None:
        await trainers_turn(run, forget_weights=False)
        trained = await _score(run, tokens, _probe_routes(run, choice))
        await servers_turn(run)
    served = ProbeScores(logprobs, np.array(most_likely(choice, TOP)))
    figures |= run.probe.compare(name, served, trained, run.server.child.log_path)
    run.served.add(step.number)
    for old in sorted(run.served - run.kept(step.number)):
        if not run.parts.merged:
            await run.server.unload_adapter(run.name(old))
        run.served.discard(old)
    return figures


async def _into_server(run: Run, step: Step) -> dict[str, float]:
    """The server, awake, holds the step's weights or adapter; what a merged sync took."""
    name = run.name(step.number)
    if not run.parts.merged:
        await servers_turn(run)
        await run.server.load_adapter(name, step.adapter)
        return {}
    # Rollouts that are under way go on under the name they began with; each token says which weights made it.
    await run.server.keep_names([run.name(old) for old in sorted(run.kept(step.number) & run.served)])
    await make_room_for_weights(run)
    figures = await _sync(run, name)
    await servers_turn(run)
    return figures


async def give_up_turn(run: Run, error: BaseException) -> None:
    """After a step that failed with `error`, in shared mode: the server serves the step of before again.

    Where that fails too the server is ended: asleep it would let requests wait for ever.
    """
    if not run.parts.shared:
        return
    step = run.store.published()[-1]
    try:
        # Whatever the error says (a cancelled call says nothing), the trainer may have changed its weights.
        await run.trainer.call("load", {"step_dir": str(run.store.step(step).path)}, deadline_s=STEP_DEADLINE_S)
        if run.parts.merged:
            await make_room_for_weights(run)
            await _sync(run, run.name(step))
        await servers_turn(run)
    except LockstepError as another:
        await run.server.close()
        error.add_note(f"the server could not go on with {run.name(step)} and was ended: {another}")


async def _sync(run: Run, name: str) -> dict[str, float]:
    """Merged weights from the trainer's memory into the server, which from then on is `name`.

    A server that was lost on the way is started anew. Raises ServerError, WeightsError or MismatchError; the server then serves what it
    served before, but in shared mode it is ended.
    """
    try:
        return await _send(run, name)
    except (ServerError, WeightsError, MismatchError) as error:
        if run.parts.shared:  # asleep it forgot the weights of before
            await run.server.close()
        elif isinstance(error, ServerLostError) or run.server.child.poll() is not None:
            await _start_server_again(run)
            return await _send(run, name) | {"server_restarts": 1.0}
        left = (
            "held no weights any more and was ended" if run.parts.shared else f"still serves {run.server.served_name}"
        )
        raise type(error)(
            f"{name} did not reach the server, which {left}: {error}; "
            "close the backend and register again to go on from the last published step"
        ) from error


async def _send(run: Run, name: str) -> dict[str, float]:
    transport = run.parts.transport
    arguments = {
        "root_url": run.server.root_url,
        "api_key": run.server.api_key,
        "version": name,
        "transport": f"disk:{run.store.path.resolve() / 'weights'}" if transport == "disk" else transport,
        "deadline_s": deadlines.SYNC_DEADLINE_S,
    }
    reply = await run.trainer.call("sync", arguments, deadline_s=STEP_DEADLINE_S)
    run.server.served_name = name
    return {
        "sync_bytes": float(reply["nbytes"]),
        "seconds_sync_transfer": reply["transfer_s"],
        "seconds_sync_pause": reply["pause_s"],
    }


async def _start_server_again(run: Run) -> None:
    """In the place of one that died, or that was ended half-way through a swap: rollouts have to begin again, at a new address."""
    await run.server.close()
    await run.model._disconnect()
    config = run.parts.server_config(f"{run.model.name}@base")
    run.server = await launch(config, find_runtime(run.parts.devices.kind), run.store.path)
    run.served.clear()


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
