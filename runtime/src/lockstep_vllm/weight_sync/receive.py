"""One sync's buckets on their way in: received by a thread of its own while the engine goes on.

Two buckets are under way at a time. `staged`: each goes into memory of its own, and nothing live is
touched. `streamed`: two buffers alternate, and each bucket is copied into the live parameters as
soon as it arrives. This is for a paused engine only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lockstep_wire.digest import Digests
from lockstep_wire.plan import WirePlan
from lockstep_wire.transports import Receiver
from lockstep_wire.transports.nccl import passed

Land = Callable[[int, torch.Tensor], None]
"""The action on a bucket (its number in the plan, its bytes) once it has arrived."""


class Incoming:
    """A receive under way. What it shows is written by its thread and final once `done`."""

    def __init__(
        self,
        version: str,
        plan: WirePlan,
        transports: Sequence[Receiver],
        buffers: Sequence[torch.Tensor],
        device: torch.device,
        land: Land | None = None,
        seen: Land | None = None,
    ) -> None:
        """buffers: bucket i is received into number i modulo their count.
        land: on the device's stream, before a buffer is used again.

        seen: looks at a bucket before it lands; it may read, and leaves everything as it is.
        """
        self.version, self.streamed = version, land is not None
        self.waiting_for, self.failure = "", ""
        self.digests: list[list[str]] = []
        self._plan, self._transports, self._buffers, self._land = plan, transports, buffers, land
        self._device, self._seen = device, seen
        self._arrivals: list[torch.cuda.Event] = []
        self._before: torch.cuda.Event | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="lockstep-sync")

    def start(self) -> None:
        """Called on the thread that made the buffers."""
        if self._device.type == "cuda":
            # Its current stream, which in vLLM is not the default one: what the buffers' memory was
            # used for before may still be queued.
            self._before = torch.cuda.Event()
            self._before.record()
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """True if it is done within that time."""
        self._thread.join(seconds)
        return self.done

    def _run(self) -> None:
        stream: AbstractContextManager[Any] = nullcontext()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            stream = torch.cuda.stream(torch.cuda.Stream(self._device))
        totals = Digests(len(self._plan.buckets), self._device)
        try:
            with stream, torch.no_grad():
                if self._before is not None:
                    self._before.wait()
                self._receive_all(totals)
                self._await_arrivals()
        except Exception as error:  # noqa: BLE001 (the thread's boundary: whatever it is, the sender must hear of it)
            self.failure = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
            for transport in self._transports:
                transport.close()
            return
        read = totals.read()
        for sender in range(self._plan.senders):
            own = [i for i, bucket in enumerate(self._plan.buckets) if bucket.sender == sender]
            self.digests.append([read[i] for i in own])
        self.waiting_for = ""

    def _receive_all(self, totals: Digests) -> None:
        buckets = self._plan.buckets
        waits: list[Callable[[], None]] = []
        if buckets:
            self._note(0)
            waits.append(self._start(0))
        for number, bucket in enumerate(buckets):
            # The next one starts before this one is looked at. It is queued behind the landing of
            # the bucket whose buffer it takes.
            if number + 1 < len(buckets):
                waits.append(self._start(number + 1))
            self._note(number)
            waits[number]()
            bytes_N = self._buffer(number)
            totals.add(number, bytes_N, seed=bucket.index)
            if self._seen is not None:
                self._seen(number, bytes_N)
            if self._land is not None:
                self._land(number, bytes_N)
            if self._device.type == "cuda":
                arrival = torch.cuda.Event()
                arrival.record()
                self._arrivals.append(arrival)

    def _start(self, number: int) -> Callable[[], None]:
        return self._transports[self._plan.buckets[number].sender].receive(self._buffer(number))

    def _buffer(self, number: int) -> torch.Tensor:
        return self._buffers[number % len(self._buffers)][: self._plan.buckets[number].nbytes]

    def _note(self, number: int) -> None:
        bucket = self._plan.buckets[number]
        self.waiting_for = bucket.first if self._plan.senders == 1 else f"{bucket.first} from sender {bucket.sender}"

    def _await_arrivals(self) -> None:
        """On a GPU everything so far is only queued: here the host waits for it, bucket by bucket."""
        for number, arrival in enumerate(self._arrivals):
            self._note(number)
            deadline_s = self._transports[self._plan.buckets[number].sender].deadline_s
            if not passed(arrival, deadline_s):
                raise RuntimeError(f"it did not come within {deadline_s:g} s: NCCL was aborted")
