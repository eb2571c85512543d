"""The live page on loopback, and the table in the terminal."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console
from starlette.testclient import TestClient

from lockstep.cli.report.live import page_app
from lockstep.cli.report.terminal import watch_run
from lockstep.errors import StoreError
from lockstep.runs.database import RunDatabase
from runs import healthy_metrics, make_run


@pytest.fixture
def run(tmp_path):
    random = np.random.default_rng()
    metrics = healthy_metrics(6, random)
    for values in metrics.values():
        values["seconds_rollout"] = 99.0
    return make_run(tmp_path, "/nowhere", metrics, {}, random).path


def test_the_page_wants_its_token_and_follows_the_run(run):
    client = TestClient(page_app(run, "secret"))
    for address in ("/", "/?token=other", "/changed", "/changed?token="):
        assert client.get(address).status_code == 401
    page = client.get("/?token=secret").text
    assert '"live":true' in page
    before = client.get("/changed?token=secret").text
    assert client.get("/changed?token=secret").text == before
    RunDatabase(run).record(6, {"reward": 0.123456})
    assert client.get("/changed?token=secret").text != before
    assert "0.123456" not in page
    assert "0.123456" in client.get("/?token=secret").text


def test_the_table_has_the_steps_and_the_advice(run, tmp_path):
    console = Console(width=80, record=True)
    watch_run(run, True, console)
    text = console.export_text()
    assert "demo/run" in text
    assert "seconds" in text  # nothing is cut off in 80 columns
    assert all(f" {step} " in text for step in range(1, 7))
    assert "waits 99.0 s for rollouts" in text
    with pytest.raises(StoreError, match="is not a run"):
        watch_run(tmp_path / "nothing", True, console)
