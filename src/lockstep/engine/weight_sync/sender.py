"""One weight sync, from the senders' side: stream, commit, or leave the server as it was.

Every sender has a connection of its own and streams what it holds; rank 0 speaks to the server for
all. `staged`: a server with memory for a second copy receives into that copy while it generates. It
pauses, swaps and resumes only when every byte is there and all digests agree. A failure before the
swap leaves the old version serving. `streamed`: otherwise the server pauses first and receives
straight into the live weights. A failure on the way ends the server, and ServerLostError says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, NoReturn, TypeVar

import torch

from lockstep.config import deadlines
from lockstep.engine.weight_sync.buckets import BucketFiller
from lockstep.engine.weight_sync.control import Control, Endpoint
from lockstep.engine.weight_sync.plan import Plan, SyncPlan
from lockstep.engine.weight_sync.sender_group import SenderGroup, SingleSender, run_on_all
from lockstep.engine.weight_sync.transports import translated
from lockstep.errors import LockstepError, ServerLostError
from lockstep.trainer.protocol import SyncReport
from lockstep_wire import http_paths
from lockstep_wire.digest import Digests
from lockstep_wire.transports import Sender

__all__ = ["AdapterPusher", "Endpoint", "Pushers", "SyncReport", "WeightPusher"]


Policy = Literal["auto", "staged", "streamed"]


class _Pusher:
    """One sender's part; it keeps the connection, the plan and the buffers from sync to sync. Every
    sender calls the same, together.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        transport: Sender,
        plan: SyncPlan | Plan,
        *,
        device: torch.device | str = "cpu",
        deadline_s: float = deadlines.SYNC_S,
        senders: SenderGroup | None = None,
        policy: Policy = "auto",
    ) -> None:
        """plan: of all senders, equal on each. A single sender may give its own plan alone.
        policy: "auto" stages where there is memory for a second copy.
        """
        self._plan = SyncPlan((plan,)) if isinstance(plan, Plan) else plan
        self._senders = senders or SingleSender()
        self._control = Control(endpoint, deadline_s)
        self._transport = transport
        self._described = self._plan.to_json()
        self._deadline_s = deadline_s
        self._policy = policy
        self._device = torch.device(device)
        self._filler = BucketFiller(self._plan.senders[self._senders.rank], self._device)
        self._connected = False
        self._queued_at = 0.0

    @property
    def _leads(self) -> bool:
        return self._senders.rank == 0

    def connect(self) -> None:
        """Brings the server's workers into the transport and gives them the plan. `push` does it
        when it is needed.

        Raises WeightsError when the plan names a weight the server does not know, or misses one
        that it holds.
        """
        self._transport.close()
        asked = self._step(lambda: self._control.call("GET", http_paths.SYNC) if self._leads else None)
        infos = self._step(lambda: self._transport.open(int(asked[0]["workers"])))

        def join() -> None:
            if self._leads:
                self._control.during(http_paths.SYNC_CONNECT, {"senders": infos}, translated(self._transport.accept))
            else:
                self._transport.accept()

        try:
            self._step(join)
            self._step(
                lambda: self._control.call("POST", http_paths.SYNC_PLAN, self._described) if self._leads else None
            )
        except LockstepError:
            self.close()
            raise
        self._connected = True

    def close(self) -> None:
        """Drops the connection; the server keeps what it serves."""
        self._connected = False
        self._transport.close()
        self._control.close()

    def _sync(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: str, path: str, extra: dict[str, Any]
    ) -> SyncReport:
        started = time.monotonic()
        if not self._connected:
            self.connect()
        asked = time.monotonic()
        try:
            policy = self._step(lambda: self._prepare(version))[0]["policy"]
            prepared = time.monotonic()
            digests = self._step(lambda: self._send(tensors))
            transferred = time.monotonic()
            body = {"version": version, "digests": digests, "deadline_s": self._deadline_s, **extra}
            reply = self._step(lambda: self._control.call("POST", path, body) if self._leads else None)[0]
        except LockstepError as error:
            self._give_up(version, error)
        except BaseException:
            self.close()
            self._abort()
            raise
        ended = time.monotonic()
        return SyncReport(
            version=version,
            nbytes=self._plan.nbytes,
            transfer_s=transferred - started,
            commit_s=ended - transferred,
            pause_s=reply["pause_s"],
            policy=policy,
            path=reply["path"],
            compared=reply["compared"],
            phases={
                "prepare": prepared - asked,
                "send": self._queued_at - prepared,
                "flush": transferred - self._queued_at,
                **reply["phases"],
            },
        )

    def _step(self, step: Any) -> list[Any]:
        # Twice: one deadline for the step itself, one for those that got to it late.
        return run_on_all(self._senders, translated(step), 2 * self._deadline_s)

    def _prepare(self, version: str) -> Any:
        if not self._leads:
            return None
        body = {"plan": self._described["id"], "version": version, "policy": self._policy}
        return self._control.call("POST", http_paths.SYNC_RECEIVE, body)

    def _send(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        digests = Digests(len(self._filler.plan.buckets), self._device)
        for index, _, bytes_N in self._filler.fill(tensors):
            digests.add(index, bytes_N)
            self._transport.send(bytes_N)
        self._queued_at = time.monotonic()
        self._transport.flush()
        return digests.read()

    def _give_up(self, version: str, error: LockstepError) -> NoReturn:
        """Undoes what can be undone and raises the error, with what the server says of it."""
        # The two sides may be at different buckets: only a new connection is sure to be at the
        # first.
        self.close()
        left = self._abort()
        if left["lost"] and not isinstance(error, ServerLostError):
            raise ServerLostError(
                f"{error}; the server had begun to take {version} into its live weights and was ended: "
                "restart it from the last published step"
            ) from error
        if left["waiting_for"] and left["waiting_for"] not in str(error):
            raise type(error)(f"{error}; the server was waiting for {left['waiting_for']!r}") from error
        raise error

    def _abort(self) -> dict[str, Any]:
        """Makes the server forget what it received. `lost`: it could not, and ended itself.
        `waiting_for`: what had not come.
        """
        nothing = {"lost": False, "waiting_for": ""}
        if not self._leads:
            return nothing
        try:
            return self._control.call("POST", http_paths.SYNC_ABORT)
        except LockstepError:
            return nothing  # the error that led here is the one to report


class WeightPusher(_Pusher):
    """All weights of the base model, again and again: merged weights and full fine-tuning."""

    def __init__(self, *arguments: Any, skipped: Sequence[str] = (), **options: Any) -> None:
        """skipped: starts of names of the checkpoint that are never sent, since the server does not
        load them. Else as `_Pusher`.
        """
        super().__init__(*arguments, **options)
        self._described |= {"skipped": list(skipped)}

    def push(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: str, served_name: str | None = None
    ) -> SyncReport:
        """Sends the weights and makes them `version`; all or nothing.

        tensors: (key, tensor) of this sender's sources, in the plan's order.
        served_name: the base model's name from now on.

        Raises WeightsError (the stream is not the plan's), ServerError (a side stalled or refused)
        or MismatchError (the received bytes, or those in an adapter's slot, differ from the sent
        ones). After each the server serves what it served before. Raises ServerLostError when it
        can't, and has to be restarted.
        """
        return self._sync(tensors, version, http_paths.SYNC_COMMIT, {"served_name": served_name})


class AdapterPusher(_Pusher):
    """Adapters from memory, one name per version; nothing is written to disk."""

    def __init__(
        self,
        endpoint: Endpoint,
        transport: Sender,
        plan: SyncPlan | Plan,
        adapter_config: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        deadline_s: float = deadlines.SYNC_S,
        senders: SenderGroup | None = None,
    ) -> None:
        """adapter_config: the fields of PEFT's adapter_config.json."""
        # An adapter is received into memory of its own whatever there is room for, so there is
        # nothing to choose.
        super().__init__(
            endpoint, transport, plan, device=device, deadline_s=deadline_s, senders=senders, policy="staged"
        )
        self._described |= {"adapter": dict(adapter_config)}
        # PEFT lists stacked experts as parameters of the model; vLLM needs a flag for them.
        self._extra = {"stacked_experts": bool(adapter_config.get("target_parameters"))}

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], name: str) -> SyncReport:
        """Sends an adapter's tensors (by their names in a PEFT file) and serves them as model
        `name`.

        Raises like `WeightPusher.push`, and WeightsError when the name is taken or a module is
        unknown. The server goes on serving what it served before. `Server.unload_adapter` frees it
        again.
        """
        return self._sync(tensors, name, http_paths.SYNC_COMMIT_ADAPTER, self._extra)


P = TypeVar("P", bound=_Pusher)


class Pushers(Generic[P]):
    """A pusher for each server, kept from sync to sync."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[Any, ...], P]] = {}

    def to(self, endpoint: Endpoint, how: tuple[Any, ...], others: Sequence[str], connected: Callable[[], P]) -> P:
        """The pusher to this server, made by `connected` where there is none that works in this way.

        how: what a pusher is made for. others: addresses of servers whose pushers are kept; all others end.
        """
        url, how = endpoint.root_url, (endpoint, *how)
        for known in [known for known in self._kept if known not in (url, *others)]:
            self._kept.pop(known)[1].close()
        if url in self._kept and self._kept[url][0] != how:
            self._kept.pop(url)[1].close()
        if url not in self._kept:
            self._kept[url] = how, connected()
        return self._kept[url][1]
