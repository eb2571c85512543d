"""Lockstep's own routes on the server, under `/lockstep`."""

# pyright: reportMissingImports=false

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from lockstep_vllm import choices, spans, sync_routes, turns
from lockstep_vllm.plugin import vllm_version


class LockstepRoutes:
    """The endpoint plugin that vLLM instantiates (its protocol `EndpointPlugin`)."""

    name = "lockstep"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        @app.get("/lockstep/status")
        async def status() -> dict[str, Any]:
            """vLLM's version and the requests being served now, by model name."""
            return {"vllm": vllm_version(), "in_flight": dict(choices.in_flight)}

        sync_routes.add_routes(app)
        turns.add_routes(app)
        spans.apply()

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Called once the engine is up. The first version is the name that the base model is served under."""
        assert engine_client is not None
        state.lockstep_turns = turns.Turns(engine_client)
        state.lockstep_sync = sync_routes.WeightSync(engine_client, state)
        await engine_client.update_weight_version(args.served_model_name[0])
