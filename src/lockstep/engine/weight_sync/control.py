"""The server's sync endpoints, as the sender's rank 0 calls them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from lockstep.errors import LockstepError, MismatchError, ServerError, ServerLostError, WeightsError
from lockstep_wire import error_kinds

_IDLE_S = 2.0
"""A connection that was idle for longer is replaced: vLLM closes its end after 5 s, and a call must
not meet that.
"""


_KINDS: dict[str, type[LockstepError]] = {
    error_kinds.WEIGHTS: WeightsError,
    error_kinds.MISMATCH: MismatchError,
    error_kinds.LOST: ServerLostError,
}


@dataclass(frozen=True)
class Endpoint:
    """The address of the server and the token that opens it."""

    root_url: str
    api_key: str = field(repr=False)


class Control:
    """One call at a time over one connection; each raises ServerError, WeightsError or
    MismatchError for what the server refuses.
    """

    def __init__(self, endpoint: Endpoint, deadline_s: float) -> None:
        self._endpoint = endpoint
        self._deadline_s = deadline_s
        self._client: httpx.Client | None = None

    def close(self) -> None:
        """Drops the connection; the next call makes a new one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._endpoint.api_key}"}
        url = self._endpoint.root_url + path
        try:
            response = self._open().request(method, url, json=body, headers=headers)
        except httpx.TimeoutException:
            raise ServerError(f"the server did not answer {method} {path} within {self._deadline_s:g} s") from None
        except httpx.TransportError as error:
            raise ServerError(f"the server broke off {method} {path}: {error or type(error).__name__}") from None
        if response.status_code == 200:
            return response.json()
        raise _refusal(response, f"{method} {path}")

    def _open(self) -> httpx.Client:
        if self._client is None:
            limits = httpx.Limits(keepalive_expiry=_IDLE_S)
            self._client = httpx.Client(timeout=self._deadline_s, verify=False, trust_env=False, limits=limits)
        return self._client

    def during(self, path: str, body: dict[str, Any], step: Callable[[], None]) -> None:
        """POST in a background thread while `step` runs. Server and sender must join the transport
        at the same time; the POST returns when the server has joined.
        """
        answers: list[LockstepError | None] = []

        def call() -> None:
            try:
                self.call("POST", path, body)
                answers.append(None)
            except LockstepError as error:
                answers.append(error)

        caller = threading.Thread(target=call, daemon=True)
        caller.start()
        try:
            step()
        except LockstepError:
            caller.join(1.0)  # a refusal says more than the deadline it led to
            if answers and answers[0] is not None:
                raise answers[0] from None
            raise
        caller.join(self._deadline_s)
        refusal = answers[0] if answers else ServerError(f"the server did not join within {self._deadline_s:g} s")
        if refusal is not None:
            raise refusal


def _refusal(response: httpx.Response, what: str) -> LockstepError:
    """The server's refusal as the error it stands for."""
    try:
        error = response.json().get("error", {})
    except ValueError:
        error = {}
    message = error.get("message") or response.text[:500]
    return _KINDS.get(error.get("type", ""), ServerError)(f"the server refused {what}: {message}")
