"""The exchange of the ipc transport, without a GPU: memory of one process stands in for mapped memory, the rest is as it is."""

from __future__ import annotations

import threading

import pytest
import torch

from lockstep_wire.transports import ipc
from lockstep_wire.transports.base import TransportError, UnusableTransportError

WORKERS, BUCKETS, SIZE = 2, 7, 1000


@pytest.fixture
def mapped(monkeypatch):
    """Handles that lead to this process's own buffers."""
    buffers: dict[str, torch.Tensor] = {}

    def share(buffer):
        storage_N = torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
        name = str(buffer.untyped_storage().data_ptr())
        buffers[name] = storage_N
        return [{"base64": "aGFuZGxl"}, name]

    monkeypatch.setattr(ipc, "share", share)
    monkeypatch.setattr(ipc, "map_shared", lambda handle: buffers[handle[1]])
    return buffers


def workers(info, received, count=BUCKETS):
    """Threads that receive `count` buckets each into `found[rank]`."""

    def receive(rank):
        transport = ipc.IpcReceiver(info, rank, torch.device("cpu"))
        for number in range(count):
            bucket_N = torch.empty(SIZE - number, dtype=torch.uint8)
            transport.receive(bucket_N)()
            received[rank].append(bucket_N)
        transport.close()

    threads = [threading.Thread(target=receive, args=(rank,)) for rank in received]
    for thread in threads:
        thread.start()
    return threads


def test_every_worker_copies_each_bucket_before_its_buffer_is_filled_again(mapped):
    sender = ipc.IpcSender(20.0)
    received: dict[int, list[torch.Tensor]] = {rank: [] for rank in range(1, WORKERS + 1)}
    threads = workers(sender.open(WORKERS), received)
    sender.accept()
    buffers = [torch.zeros(SIZE, dtype=torch.uint8) for _ in range(2)]
    sent = [torch.randint(256, (SIZE - number,), dtype=torch.uint8) for number in range(BUCKETS)]
    for number, bytes_N in enumerate(sent):
        buffer = buffers[number % 2][: len(bytes_N)]
        buffer.copy_(bytes_N)
        sender.send(buffer)
    sender.flush()
    for buffer in buffers:
        buffer.zero_()
    for thread in threads:
        thread.join(20)
    assert all(torch.equal(a, b) for rank in received for a, b in zip(received[rank], sent, strict=True))
    assert len(mapped) == 2  # each buffer was mapped once
    sender.close()
    sender.close()


def test_a_worker_that_stops_is_named_at_the_deadline(mapped):
    sender = ipc.IpcSender(1.0)
    received: dict[int, list[torch.Tensor]] = {1: [], 2: []}
    threads = workers(sender.open(WORKERS), received, count=1)
    sender.accept()
    for number in range(2):
        sender.send(torch.zeros(SIZE - number, dtype=torch.uint8))
    with pytest.raises(TransportError, match="taken/1/1, taken/1/2"):
        sender.flush()
    for thread in threads:
        thread.join(20)
    sender.close()


def test_memory_of_the_host_is_refused():
    with pytest.raises(UnusableTransportError, match="'ipc', which maps GPU memory"):
        ipc.share(torch.zeros(4, dtype=torch.uint8))
