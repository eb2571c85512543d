"""Ranks agree on outcomes, and one that fails ends those that can no longer be answered, with its own message."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from helpers import ENGINE
from lockstep.engine.worker import share
from lockstep.testing.programs import torchrun
from lockstep.trainer.protocol import SyncAdapter, split_secrets

pytestmark = pytest.mark.distributed


def run(case: str, folder: Path) -> tuple[int, dict[str, str]]:
    command = torchrun(2, str(ENGINE / "agreement_ranks.py"), case, str(folder))
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=120, check=False
    )
    return done.returncode, {p.name: p.read_text() for p in folder.iterdir()}


def test_fine(tmp_path: Path) -> None:
    assert run("fine", tmp_path) == (0, {"settled-0": "fine", "settled-1": "fine"})


def test_both_fail_alike_and_live_on(tmp_path: Path) -> None:
    status, files = run("both fail", tmp_path)
    assert status == 0
    assert files == {"settled-0": "rank 0 met a bad row", "settled-1": "rank 0 met a bad row"}


def test_one_fails_while_the_other_is_stuck(tmp_path: Path) -> None:
    status, files = run("one fails", tmp_path)
    assert status != 0
    assert "rank 1 met a bad row" in files["gave-up-0"]
    assert "settled-0" not in files


def test_c1_a_request_reaches_other_ranks_without_its_secret() -> None:
    """Rank 0 alone is given the server's token, whatever it publishes to the others."""
    published: list[dict[str, object]] = []

    class Recorder:
        def publish(self, number: int, request: dict[str, object]) -> None:
            published.append(request)

    asked = SyncAdapter("http://127.0.0.1:1", "m@1", "gloo", 1.0, api_key="s3cret")
    fields, secret = split_secrets(asked)
    share(1, {"id": 1, "verb": asked.verb, "args": fields, "secret": secret}, Recorder())  # pyright: ignore
    expected = {
        "root_url": "http://127.0.0.1:1",
        "version": "m@1",
        "transport": "gloo",
        "deadline_s": 1.0,
        "others": [],
    }
    assert published == [{"id": 1, "verb": "sync_adapter", "args": expected}]
    assert "s3cret" not in str(published)
    assert secret == {"api_key": "s3cret"}
    assert "s3cret" not in repr(asked)
