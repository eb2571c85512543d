"""Brings a step into the server and proves that it is there.

Shape suffixes: S tokens, L layers, K experts per token.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from lockstep.backends import run as deadlines
from lockstep.backends.run import STEP_DEADLINE_S, Run
from lockstep.errors import MismatchError, ServerError, WeightsError
from lockstep.tokens.batch import unpack_scores
from lockstep.tokens.pack import pack, save_batch
from lockstep.tokens.routes import decode_routes
from lockstep.tokens.tree import scoring_sequence

if TYPE_CHECKING:
    from lockstep.model import TrainableModel
    from lockstep.store import Step


async def serve(run: Run, model: TrainableModel, step: Step) -> dict[str, float]:
    """Bring `step`, which the trainer holds, into the server, prove that it is there, and retire what no rollout uses.

    Returns the probe's mean difference and what a merged sync took.
    """
    name = f"{model.name}@{step.number}"
    figures = await _sync(run, name) if run.parts.merged else {}
    if not run.parts.merged:
        await run.server.load_adapter(name, step.adapter)
    tokens = list(run.probe.tokens)
    served, choice = await run.server.score_choice(name, tokens)
    trained = await _score(run, tokens, _probe_routes(run, choice))
    figures["probe"] = run.probe.compare(name, served, trained, run.server.child.log_path)
    if run.parts.merged:
        return figures
    run.served.add(step.number)
    keep = {step.number, step.number - 1} | model.leased_steps()
    for old in sorted(run.served - keep):
        await run.server.unload_adapter(f"{model.name}@{old}")
        run.served.discard(old)
    return figures


async def _sync(run: Run, name: str) -> dict[str, float]:
    """Merged weights from the trainer's memory into the server, which from then on is `name` and nothing else.

    Raises ServerError, WeightsError or MismatchError; the server then serves what it served before.
    """
    arguments = {
        "root_url": run.server.root_url,
        "api_key": run.server.api_key,
        "version": name,
        "transport": "gloo",
        "deadline_s": deadlines.SYNC_DEADLINE_S,
    }
    try:
        reply = await run.trainer.call("sync", arguments, deadline_s=STEP_DEADLINE_S)
    except (ServerError, WeightsError, MismatchError) as error:
        run.server.check_alive()
        raise type(error)(
            f"{name} did not reach the server, which still serves {run.server.served_name}: {error}; "
            "close the backend and register again to go on from the last published step"
        ) from error
    run.server.served_name = name
    return {
        "sync_bytes": float(reply["nbytes"]),
        "seconds_sync_transfer": reply["transfer_s"],
        "seconds_sync_pause": reply["pause_s"],
    }


async def _score(run: Run, tokens: list[int], routes_SLK: np.ndarray | None) -> list[float]:
    """The trainer's log-probability of each token after the first, on the experts that the server used."""
    batch_path, out = (run.store.path / "batches" / name for name in ("probe.safetensors", "probe-scores.safetensors"))
    sequence = scoring_sequence("probe", tokens, routes_SLK)
    batch = pack([sequence], np.zeros(1), np.ones(1), data=run.parts.parallel.data)
    await asyncio.to_thread(save_batch, batch, batch_path)
    await run.trainer.call("score", {"batch": str(batch_path), "out": str(out)}, deadline_s=STEP_DEADLINE_S)
    scores = await asyncio.to_thread(load_file, out)
    return [float(value) for value in unpack_scores(batch, scores["logprobs_RS"])[0]]


def _probe_routes(run: Run, choice: dict[str, Any]) -> np.ndarray | None:
    """The experts the server used for the probe; None where none are captured."""
    if run.parts.routes is None:
        return None
    given = (choice.get("routed_experts"), choice.get("routes_digest"))
    return decode_routes(*given, choice["prompt_token_ids"], choice["token_ids"], run.parts.routes, "the probe")
