"""Lockstep's own endpoints on the server, under `/lockstep`."""

# pyright: reportMissingImports=false

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from lockstep_vllm import patches
from lockstep_vllm.http import openai_fields, pulse, siblings_api, sleep_api, sync_api
from lockstep_vllm.version import vllm_version
from lockstep_wire import http_paths


class LockstepApi:
    """The endpoint plugin that vLLM instantiates (its protocol `EndpointPlugin`)."""

    name = "lockstep"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        @app.get(http_paths.STATUS)
        async def status() -> dict[str, Any]:
            """vLLM's version and the requests being served now, by model name."""
            return {"vllm": vllm_version(), "in_flight": dict(openai_fields.in_flight)}

        siblings_api.add_endpoint(app)
        sync_api.add_endpoints(app)
        sleep_api.add_endpoints(app)
        pulse.add_endpoints(app)
        patches.apply("api", on_cpu=False)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """vLLM calls this once, when the engine is up. The weights' first version is the base model's
        served name.
        """
        assert engine_client is not None
        state.lockstep_pulse = pulse.Pulse(engine_client)
        state.lockstep_sleep = sleep_api.SleepControl(engine_client, state.lockstep_pulse)
        state.lockstep_sync = sync_api.WeightSync(engine_client, state)
        await engine_client.update_weight_version(args.served_model_name[0])
