"""One weight sync, from the trainer's side: stream, commit, or leave the server as it was.

The server receives into staging memory while it goes on generating; only when every byte is there and its digests agree
does it pause, swap and resume (`commit`). Anything that fails before leaves the old version serving.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from lockstep.errors import MismatchError, ServerError, WeightsError
from lockstep.sync.digest import digest
from lockstep.sync.export import BucketFiller
from lockstep.sync.plan import Plan
from lockstep.sync.transports import Transport


@dataclass(frozen=True)
class Endpoint:
    """Where the server is and the token that opens it."""

    root_url: str
    api_key: str


@dataclass(frozen=True)
class SyncReport:
    """What one sync took. Seconds by the wall clock; `pause_s` is the server's own figure."""

    version: str
    nbytes: int
    transfer_s: float
    commit_s: float
    pause_s: float


class _Pusher:
    """Keeps the connection, the plan and the buffers from sync to sync. Used by the sending rank only."""

    def __init__(
        self, endpoint: Endpoint, transport: Transport, plan: Plan, *, device: str = "cpu", deadline_s: float = 300.0
    ) -> None:
        self._endpoint = endpoint
        self._transport = transport
        self._plan = plan
        self._described = plan.to_json()
        self._deadline_s = deadline_s
        self._filler = BucketFiller(plan, device)
        self._connected = False

    def connect(self) -> None:
        """Brings the server's workers into the transport and gives them the plan. `push` does it when it is needed.

        Raises WeightsError when the plan names a weight the server does not know, or misses one that it holds.
        """
        self._transport.close()
        receivers = self._call("GET", "/lockstep/sync")["workers"]
        info = self._transport.open(receivers)
        answers: list[Exception | None] = []

        def call() -> None:
            try:
                self._call("POST", "/lockstep/sync/connect", info)
                answers.append(None)
            except (ServerError, WeightsError) as error:
                answers.append(error)

        # The server answers when it has joined, and it joins only while this side is joining too.
        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        try:
            self._transport.accept()
        finally:
            caller.join(self._deadline_s)
        refusal = answers[0] if answers else ServerError(f"the server did not join within {self._deadline_s:g} s")
        if refusal is not None:
            raise refusal
        self._call("POST", "/lockstep/sync/plan", self._described)
        self._connected = True

    def close(self) -> None:
        """Drops the connection; the server keeps what it serves."""
        self._connected = False
        self._transport.close()

    def _sync(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: str, route: str, extra: dict[str, Any]
    ) -> SyncReport:
        started = time.monotonic()
        if not self._connected:
            self.connect()
        try:
            self._call("POST", "/lockstep/sync/receive", {"plan": self._described["id"], "version": version})
            digests = self._send(tensors)
            transferred = time.monotonic()
            body = {"version": version, "digests": digests, "deadline_s": self._deadline_s, **extra}
            reply = self._call("POST", route, body)
        except BaseException:
            # The two sides may be at different buckets: only a new connection is sure to be at the first.
            self.close()
            self._abort()
            raise
        committed = time.monotonic()
        return SyncReport(version, self._plan.nbytes, transferred - started, committed - transferred, reply["pause_s"])

    def _send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        digests = []
        for index, _, bytes_N in self._filler.fill(tensors):
            digests.append(digest(bytes_N, index))
            self._transport.send(bytes_N)
        self._transport.flush()
        return digests

    def _abort(self) -> None:
        """Tells the server to forget what it staged; the error that led here is the one to report."""
        try:
            self._call("POST", "/lockstep/sync/abort")
        except (ServerError, WeightsError, MismatchError):
            return

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._endpoint.api_key}"}
        url = self._endpoint.root_url + path
        try:
            with httpx.Client(timeout=self._deadline_s, verify=False, trust_env=False) as client:
                response = client.request(method, url, json=body, headers=headers)
        except httpx.TimeoutException:
            raise ServerError(f"the server did not answer {method} {path} within {self._deadline_s:g} s") from None
        except httpx.TransportError as error:
            raise ServerError(f"the server broke off {method} {path}: {error or type(error).__name__}") from None
        if response.status_code == 200:
            return response.json()
        raise _refusal(response, f"{method} {path}")


class WeightPusher(_Pusher):
    """All weights of the base model, again and again: merged weights and full fine-tuning."""

    def push(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: str, served_name: str | None = None
    ) -> SyncReport:
        """Sends the weights and makes them `version`; all or nothing.

        tensors: (Hugging Face name, tensor) in the plan's order. served_name: the base model's name from now on.
        Raises WeightsError (the stream is not the plan's), ServerError (a side stalled or refused) or MismatchError
        (the bytes that came are not those that left); after each of them the server serves what it served before.
        """
        return self._sync(tensors, version, "/lockstep/sync/commit", {"served_name": served_name})


class AdapterPusher(_Pusher):
    """Adapters from memory, one name per version; nothing is written to disk."""

    def __init__(
        self,
        endpoint: Endpoint,
        transport: Transport,
        plan: Plan,
        adapter_config: Mapping[str, Any],
        *,
        device: str = "cpu",
        deadline_s: float = 300.0,
    ) -> None:
        """adapter_config: the fields of PEFT's adapter_config.json."""
        super().__init__(endpoint, transport, plan, device=device, deadline_s=deadline_s)
        self._described |= {"adapter": dict(adapter_config)}
        # PEFT lists stacked experts as parameters of the model; vLLM must be told.
        self._extra = {"stacked_experts": bool(adapter_config.get("target_parameters"))}

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], name: str) -> SyncReport:
        """Sends an adapter's tensors (by their names in a PEFT file) and serves them as model `name`.

        Raises like `WeightPusher.push`, and WeightsError when the name is taken or a module is unknown; what was
        served before goes on being served. `Server.unload_adapter` frees it again.
        """
        return self._sync(tensors, name, "/lockstep/sync/commit_adapter", self._extra)


def _refusal(response: httpx.Response, what: str) -> Exception:
    """The server's refusal as the error it stands for."""
    try:
        error = response.json().get("error", {})
    except ValueError:
        error = {}
    message = error.get("message") or response.text[:500]
    kinds: dict[str, type[Exception]] = {"weights": WeightsError, "mismatch": MismatchError}
    return kinds.get(error.get("type", ""), ServerError)(f"the server refused {what}: {message}")
