"""Endpoints of a weight sync: connect, plan, receive, commit, abort. The server answers with one
version or the next.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
import uuid
from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import Body, FastAPI
from fastapi.responses import JSONResponse
from pydantic import StringConstraints
from starlette.datastructures import State

from lockstep_vllm.adapters.from_memory import SCHEME
from lockstep_vllm.http.openai_fields import in_flight
from lockstep_vllm.http.served_names import keep_names, rename_base
from lockstep_wire import error_kinds, http_paths
from lockstep_wire.transports import MOST_S

logger = logging.getLogger("vllm.lockstep")

_POLL_S = 0.005
_STANDING_POLL_S = 0.5
_FIRST_WAIT_S = 0.004
_ENGINE_POLL_S = 0.5
"""The senders are done when they ask for a commit, so the last bucket is about to arrive. Workers
wait for the bucket this long.
"""


_MOST_NAMES = 10_000
Name = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,256}$")]
"""Of a model: visible ASCII."""


class SyncRefusedError(Exception):
    """A step that did not happen; nothing live was changed."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class WeightSync:
    """The work behind the endpoints, one request at a time. `engine` is vLLM's EngineClient."""

    def __init__(self, engine: Any, state: State) -> None:
        self._engine = engine
        self._state = state
        self._lock = asyncio.Lock()
        self._adapters: dict[str, str] = {}
        self._unloaded: dict[str, str] = {}
        self._paused_at: float | None = None

    async def workers(self) -> int:
        return self._engine.vllm_config.parallel_config.world_size_across_dp

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """Runs a receiver method on every worker. Raises SyncRefusedError with the first refusal."""
        with self._state.lockstep_pulse.busy(method):
            answers = await self._while_engine_lives(self._engine.collective_rpc(method, args=args))
        for answer in answers:
            if "error" in answer:
                raise SyncRefusedError(answer["error"], answer["message"])
        return answers

    async def _while_engine_lives(self, awaited: Awaitable[Any]) -> Any:
        """The result of `awaited`. vLLM waits for ever for an engine that has ended: raises
        SyncRefusedError (`lost`) then.
        """
        task = asyncio.ensure_future(awaited)
        while not (await asyncio.wait({task}, timeout=_ENGINE_POLL_S))[0]:
            if self._engine.errored:
                task.cancel()
                raise SyncRefusedError(error_kinds.LOST, "vLLM's engine has ended; see the server's log")
        return task.result()

    async def locked(self, method: str, *args: Any) -> dict[str, Any]:
        async with self._lock:
            await self.call(method, *args)
        return {}

    async def receive(self, plan_id: str, version: str, policy: str) -> dict[str, Any]:
        """Lets the workers begin. Without memory for a second copy the engine is paused first, and
        stays so until commit or abort.
        """
        async with self._lock:
            await self._free_unused()
            if policy == "staged":  # nothing to choose: one call does both
                await self.call("lockstep_sync_receive", plan_id, version, policy)
                return {"policy": policy}
            answers = await self.call("lockstep_sync_choose", plan_id, policy)
            chosen = "streamed" if any(answer["policy"] == "streamed" for answer in answers) else "staged"
            if any(answer["policy"] != chosen for answer in answers):
                await self.call("lockstep_sync_choose", plan_id, chosen)
            if chosen == "streamed":
                self._paused_at = time.monotonic()
                await self._while_engine_lives(self._engine.pause_generation(mode="keep", clear_cache=True))
            await self.call("lockstep_sync_receive", plan_id, version, chosen)
        return {"policy": chosen}

    async def commit(
        self, version: str, digests: list[list[str]], served_name: str | None, deadline_s: float
    ) -> dict[str, Any]:
        """Waits for the last bucket, compares digests, swaps while generation is paused."""
        async with self._lock:
            asked = time.monotonic()
            try:
                await self._all_received(digests, deadline_s)
            except SyncRefusedError as error:
                if self._paused_at is None:
                    raise
                self._end(version)
                raise SyncRefusedError(
                    error_kinds.LOST, f"{error}; {version} was half-way in the live weights, so the server was ended"
                ) from error
            received = time.monotonic()
            if self._paused_at is None:
                self._paused_at = received
                # Requests in flight are kept: their cached keys and values go, and are computed
                # again under the new weights.
                await self._while_engine_lives(self._engine.pause_generation(mode="keep", clear_cache=True))
            path, compared = await self._swap(version)
            if served_name is not None:
                rename_base(self._state, served_name)
            pause_s = await self._resume()
            phases = {"receive": received - asked, "swap": time.monotonic() - received}
            return {"version": version, "pause_s": pause_s, "path": path, "compared": compared, "phases": phases}

    async def abort(self) -> dict[str, Any]:
        """Forgets what was received. `lost`: live weights may have been overwritten, so the server
        was ended. `waiting_for`: what had not come yet.
        """
        async with self._lock:
            answers = await self.call("lockstep_sync_discard")
            waiting_for = next((answer["waiting_for"] for answer in answers if answer["waiting_for"]), "")
            if any(answer["touched"] for answer in answers):
                self._end("of an aborted sync")
                return {"lost": True, "waiting_for": waiting_for}
            if self._paused_at is not None:
                await self._resume()
        return {"lost": False, "waiting_for": waiting_for}

    async def commit_adapter(
        self, name: str, digests: list[list[str]], stacked_experts: bool, deadline_s: float
    ) -> dict[str, Any]:
        """Waits for the last bucket, compares digests, serves the adapter as `name`. Nothing else
        is touched.
        """
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        async with self._lock:
            asked = time.monotonic()
            await self._all_received(digests, deadline_s)
            received = time.monotonic()
            # Never the same path twice, also for a name that comes back: the prefix cache is keyed
            # on both.
            path = f"{SCHEME}{name}/{uuid.uuid4().hex}"
            await self.call("lockstep_sync_stage_adapter", path)
            request = LoadLoRAAdapterRequest(lora_name=name, lora_path=path, is_3d_lora_weight=stacked_experts)
            answer = await self._state.openai_serving_models.load_lora_adapter(request)
            if not isinstance(answer, str):
                await self.call("lockstep_sync_forget_adapter", path)
                raise SyncRefusedError(error_kinds.WEIGHTS, answer.error.message)
            loaded = time.monotonic()
            compared = await self._verified("lockstep_sync_verify_adapter", name, path)
            if name in self._adapters:  # one of before, unloaded by vLLM's own endpoint
                self._unloaded[self._adapters[name]] = name
            self._adapters[name] = path
            ended = time.monotonic()
            phases = {"receive": received - asked, "load": loaded - received, "verify": ended - loaded}
            reply = {"version": name, "pause_s": ended - received, "path": "adapter"}
            return reply | {"compared": compared, "phases": phases}

    async def verify_folder(self, name: str, path: str) -> dict[str, Any]:
        """Compares the slot of an adapter that vLLM loaded from a folder with the folder; one that
        differs is taken away again.
        """
        async with self._lock:
            return {"compared": await self._verified("lockstep_sync_verify_folder", name, path)}

    async def _verified(self, method: str, name: str, path: str) -> bool:
        """The slot that requests for `name` use holds what is at `path`; else the adapter is taken
        away again.

        Returns whether every worker could compare.
        """
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        models = self._state.openai_serving_models
        if name not in models.lora_requests:
            raise SyncRefusedError(error_kinds.SERVER, f"adapter {name!r} is not served")
        try:
            answers = await self.call(method, path, models.lora_requests[name].lora_int_id, name)
        except BaseException:
            await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
            await self.call("lockstep_sync_forget_adapter", path)
            raise
        return all(answer["compared"] for answer in answers)

    async def forget_adapter(self, name: str) -> dict[str, Any]:
        """Frees the tensors of an adapter that is not served any more, once no request uses them.
        Harmless for an adapter from a folder.
        """
        async with self._lock:
            path = self._adapters.get(name)
            if path is not None and name in self._state.openai_serving_models.lora_requests:
                raise SyncRefusedError(error_kinds.SERVER, f"adapter {name!r} is still served: unload it first")
            if path is not None:
                self._unloaded[self._adapters.pop(name)] = name
            await self._free_unused()
        return {}

    async def _free_unused(self) -> None:
        """A request in flight keeps its adapter: vLLM may have to load it again before the end."""
        for path, name in list(self._unloaded.items()):
            if not in_flight[name]:
                await self.call("lockstep_sync_forget_adapter", path)
                del self._unloaded[path]

    async def _all_received(self, digests: list[list[str]], deadline_s: float) -> None:
        deadline, wait_s = time.monotonic() + deadline_s, _FIRST_WAIT_S
        while True:
            # While nothing is generated the workers may as well wait themselves: they notice the
            # end at once.
            standing = self._paused_at is not None
            answers = await self.call("lockstep_sync_progress", _STANDING_POLL_S if standing else wait_s)
            wait_s = 0.0
            if all(answer["done"] for answer in answers):
                break
            if time.monotonic() > deadline:
                waiting = next(answer["waiting_for"] for answer in answers if not answer["done"])
                raise SyncRefusedError(
                    error_kinds.SERVER, f"after {deadline_s:g} s a worker still waits for {waiting!r}"
                )
            await asyncio.sleep(0.0 if standing else _POLL_S)
        for worker, answer in enumerate(answers):
            for sender, (got, sent) in enumerate(zip(answer["digests"], digests, strict=True)):
                if got != sent:
                    pairs = zip(got, sent, strict=False)
                    bucket = next(
                        (i for i, (expected_digest, other) in enumerate(pairs) if expected_digest != other), len(got)
                    )
                    raise SyncRefusedError(
                        error_kinds.MISMATCH,
                        f"bucket {bucket} of sender {sender} came to worker {worker} other than it was sent",
                    )

    async def _swap(self, version: str) -> tuple[str, bool]:
        """From the first changed parameter on there is no way back. A failure ends the server, and
        so do weights that differ from the sent ones.

        Returns the path that the weights took, and whether they could be compared.
        """
        try:
            answers = await self.call("lockstep_sync_apply")
            if not await self._engine.reset_prefix_cache(reset_running_requests=True):
                raise RuntimeError("the prefix cache was not emptied")
            await self._engine.update_weight_version(version)
            return answers[0]["path"], all(answer["compared"] for answer in answers)
        except BaseException as error:
            logger.exception("the swap to version %s failed half-way", version)
            self._end(version)
            raise SyncRefusedError(error_kinds.LOST, f"the swap to {version} failed half-way: {error}") from error

    async def _resume(self) -> float:
        """Lets generation go on; the seconds it stood still. A server that is half awake (colocated
        mode) must not generate yet:

        waking the rest resumes it.
        """
        assert self._paused_at is not None
        if not self._state.lockstep_sleep.asleep:
            await self._engine.resume_generation()
        pause_s, self._paused_at = time.monotonic() - self._paused_at, None
        return pause_s

    def _end(self, version: str) -> None:
        logger.error("ending the server: it may hold a mixture of two versions, the newer is %s", version)
        os.kill(os.getpid(), signal.SIGTERM)


def add_endpoints(app: FastAPI) -> None:
    """`/lockstep/sync/...`; `app.state.lockstep_sync` is set once the engine is there."""

    def sync() -> WeightSync:
        return app.state.lockstep_sync

    @app.get(http_paths.SYNC)
    async def sync_status() -> dict[str, Any]:
        return {"workers": await sync().workers()}

    @app.post(http_paths.SYNC_CONNECT)
    async def connect(senders: Annotated[list[dict[str, Any]], Body(embed=True)]) -> Any:
        return await _answer(sync().locked("lockstep_sync_connect", senders))

    @app.post(http_paths.SYNC_PLAN)
    async def plan(plan: dict[str, Any]) -> Any:
        return await _answer(sync().locked("lockstep_sync_plan", plan))

    @app.post(http_paths.SYNC_RECEIVE)
    async def receive(
        plan: Annotated[str, Body()], version: Annotated[Name, Body()], policy: Annotated[str, Body()] = "auto"
    ) -> Any:
        return await _answer(sync().receive(plan, version, policy))

    @app.post(http_paths.SYNC_COMMIT)
    async def commit(
        version: Annotated[Name, Body()],
        digests: Annotated[list[list[str]], Body()],
        served_name: Annotated[Name | None, Body()] = None,
        deadline_s: Annotated[float, Body(gt=0, le=MOST_S)] = 300.0,
    ) -> Any:
        return await _answer(sync().commit(version, digests, served_name, deadline_s))

    @app.post(http_paths.SYNC_COMMIT_ADAPTER)
    async def commit_adapter(
        version: Annotated[Name, Body()],
        digests: Annotated[list[list[str]], Body()],
        stacked_experts: Annotated[bool, Body()] = False,
        deadline_s: Annotated[float, Body(gt=0, le=MOST_S)] = 300.0,
    ) -> Any:
        return await _answer(sync().commit_adapter(version, digests, stacked_experts, deadline_s))

    @app.post(http_paths.SYNC_FORGET_ADAPTER)
    async def forget_adapter(name: Annotated[Name, Body(embed=True)]) -> Any:
        return await _answer(sync().forget_adapter(name))

    @app.post(http_paths.SYNC_VERIFY_FOLDER)
    async def verify_folder(name: Annotated[Name, Body()], path: Annotated[str, Body()]) -> Any:
        return await _answer(sync().verify_folder(name, path))

    @app.post(http_paths.SYNC_ABORT)
    async def abort() -> Any:
        return await _answer(sync().abort())

    _add_name_endpoints(app)


def _add_name_endpoints(app: FastAPI) -> None:
    @app.post(http_paths.SERVED_NAME)
    async def served_name(name: Annotated[Name, Body(embed=True)]) -> dict[str, Any]:
        rename_base(app.state, name)
        return {"name": name}

    @app.post(http_paths.KEPT_NAMES)
    async def kept_names(names: Annotated[list[Name], Body(embed=True, max_length=_MOST_NAMES)]) -> dict[str, Any]:
        return {"names": keep_names(app.state, names)}


async def _answer(step: Any) -> Any:
    try:
        return await step
    except SyncRefusedError as error:
        body = {"error": {"type": error.kind, "message": str(error), "code": 409}}
        return JSONResponse(body, status_code=409)
