"""Jobs of a run: claimed once, done together with their step's metrics, and never left running by a process that is gone."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import signal
import sqlite3

import pytest
from rich.console import Console

from lockstep.cli.steps import show_jobs
from lockstep.errors import StoreError
from lockstep.runs.database import read_jobs
from lockstep.runs.store import RunStore


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path, "project", "name")
    yield store
    store.close()


def reopened(store):
    store.close()
    return RunStore(store.path.parents[1], "project", "name")


def started(store, step, digest="abc", kind="lora_step"):
    job = store.jobs.submit(step, kind, digest)
    store.jobs.claim(job.id)
    return job.id


def publish(store, number, job=None):
    staged = store.stage(number)
    (staged / "weights").write_bytes(b"w")
    return store.publish(number, staged, {"loss": 0.5}, job=job)


def states(store):
    return {job.id: (job.state, job.error_type) for job in read_jobs(store.path)}


def test_a_job_is_claimed_once_and_a_step_is_made_once(store):
    publish(store, 0)
    job = started(store, 1)
    with pytest.raises(StoreError, match="0001-lora_step-1 is running, not queued"):
        store.jobs.claim(job)
    with pytest.raises(StoreError, match="0001-lora_step-1 is running: it can't be asked for again"):
        store.jobs.submit(1, "lora_step", "abc")
    publish(store, 1, job)
    assert store.jobs.submit(1, "lora_step", "abc").state == "done"
    with pytest.raises(StoreError, match="made step 1 from another batch"):
        store.jobs.submit(1, "lora_step", "other")
    with pytest.raises(StoreError, match="no job is a 'paint'"):
        store.jobs.submit(1, "paint", "abc")


def test_a_failed_job_is_tried_again_and_keeps_its_error(store):
    store.jobs.fail(started(store, 1), "TrainerError", "rank 1 was lost")
    assert store.jobs.submit(1, "lora_step", "other").attempt == 2
    assert states(store)["0001-lora_step-1"] == ("failed", "TrainerError")


def test_signs_of_life_are_of_running_jobs_only(store):
    job = started(store, 1)
    store.jobs.beat(job, "sync", "the server")
    [row] = read_jobs(store.path)
    assert (row.phase, row.waits_for) == ("sync", "the server")
    assert row.beaten >= row.claimed >= row.created
    console = Console(file=io.StringIO(), width=200)
    show_jobs(store.path, console)
    assert "0001-lora_step-1  running" in console.file.getvalue()
    assert "sync, waits for the server" in console.file.getvalue()
    store.jobs.fail(job, "ServerError", "[/x] gone")
    store.jobs.beat(job, "train", "")
    [row] = read_jobs(store.path)
    assert (row.state, row.error) == ("failed", "[/x] gone")
    show_jobs(store.path, console)
    assert "ServerError: [/x] gone" in console.file.getvalue()


def test_m2_a_kill_between_rename_and_record_is_repaired_from_the_manifest(store, monkeypatch):
    publish(store, 0)
    job = started(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(store._database), "record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(store, 1, job)
    assert states(store) == {job: ("running", None)}
    again = reopened(store)
    assert states(again) == {job: ("done", None)}
    assert again.metrics()[1] == {"loss": 0.5}
    again.close()


def test_a_metric_that_cannot_be_recorded_leaves_the_job_as_it_was(store):
    """One transaction: neither half is there without the other."""
    job = started(store, 1)
    with pytest.raises((StoreError, sqlite3.Error)):
        store._database.record(1, {"good": 1.0, "bad": object()}, job)
    assert states(store) == {job: ("running", None)}
    assert store.metrics() == {}


def killed_while_running(folder):
    store = RunStore(folder, "project", "name")
    started(store, 1)
    store.jobs.submit(0, "first_sync", "server 0")
    os.kill(os.getpid(), signal.SIGKILL)


def test_jobs_of_a_killed_process_have_failed_and_a_deleted_step_is_made_again(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=killed_while_running, args=(tmp_path,))
    process.start()
    process.join()
    store = RunStore(tmp_path, "project", "name")
    assert set(states(store).values()) == {("failed", "Interrupted")}
    publish(store, 0)
    publish(store, 1, started(store, 1))
    shutil.rmtree(store.path / "steps" / "0001")
    again = reopened(store)
    assert again.jobs.submit(1, "lora_step", "abc").attempt == 3
    again.close()
