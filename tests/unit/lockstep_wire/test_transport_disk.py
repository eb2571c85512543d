"""Buckets as files: whole or not there, removed when they are done with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lockstep_wire.transports.base import TransportError
from lockstep_wire.transports.disk import DiskReceiver, DiskSender

CPU = torch.device("cpu")


def bucket(size: int = 999) -> torch.Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8)


def received(transport, size: int = 999) -> torch.Tensor:
    bytes_N = torch.empty(size, dtype=torch.uint8)
    transport.receive(bytes_N)()
    return bytes_N


def test_bytes_arrive_and_a_finished_sync_is_removed(tmp_path):
    sender = DiskSender(5.0, tmp_path / "weights")
    info = sender.open(2)
    receivers = [DiskReceiver(info, rank, CPU) for rank in (1, 2)]
    folder = Path(info["folder"])
    for sync in range(3):
        sent = [bucket() for _ in range(3)]
        for bytes_N in sent:
            sender.send(bytes_N)
        sender.flush()
        assert len(list(folder.iterdir())) == 3, sync
        for transport in receivers:
            assert all(torch.equal(received(transport), bytes_N) for bytes_N in sent)
    assert folder.stat().st_mode & 0o777 == 0o700
    sender.close()
    sender.close()
    assert not folder.exists()


def test_torn_missing_and_other_files_are_refused(tmp_path):
    sender = DiskSender(5.0, tmp_path)
    info = sender.open(1) | {"deadline_s": 0.2}
    for _ in range(2):
        sender.send(bucket())
    receiver, folder = DiskReceiver(info, 1, CPU), Path(info["folder"])
    first = folder / "00000000.safetensors"
    intact = first.read_bytes()
    for cut in (0, 5, 100, len(intact) - 1):
        first.write_bytes(intact[:cut])
        with pytest.raises(RuntimeError, match=r"00000000\.safetensors is corrupt"):
            received(receiver)
    first.write_bytes(intact)
    with pytest.raises(RuntimeError, match="expected 1000 bytes"):
        received(receiver, 1000)
    received(receiver)
    received(receiver)
    (folder / "00000002.part").write_bytes(intact)  # written, not yet named
    with pytest.raises(RuntimeError, match=r"00000002\.safetensors did not come"):
        received(receiver)
    sender.close()
    with pytest.raises(ValueError, match="both sides see"):
        DiskReceiver(info, 1, CPU)


def test_a_folder_that_takes_no_files_is_one_error(tmp_path):
    sender = DiskSender(5.0, tmp_path)
    folder = Path(sender.open(1)["folder"])
    folder.rmdir()
    folder.write_text("a file where the folder was")
    with pytest.raises(TransportError, match="could not be written"):
        sender.send(bucket())
