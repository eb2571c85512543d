"""A trainer that is lost in a step: killed, stopped or silent. The step is made all the same, or the run stops clearly (audit H9, M4).

One server for the whole file; the trainers come and go.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest

import lockstep as ls
from endless import LOOP, endless_on_signal
from frozen_processes import children, engine_core
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.config import deadlines
from lockstep.errors import TrainerLostError
from lockstep.models.tiny.write import write_tiny
from lockstep.runs.database import read_jobs
from lockstep.runs.store import published_steps
from replaying import group, roll_out, words

pytestmark = pytest.mark.server
CONFIG = ls.TrainConfig(learning_rate=1e-2)


@pytest.fixture(scope="module")
async def running(runtime, tmp_path_factory):
    """(model, backend) at step 0. The signal LOOP sends the trainer's ranks into an endless loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(endless_on_signal(tmp_path_factory.mktemp("planted"))))
        model, backend = await registered(tmp_path_factory.mktemp("supervised"))
        yield model, backend
        await backend.close()


async def registered(folder, **settings):
    """(model, backend) at step 0, on a fresh tiny model."""
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    base = write_tiny("qwen3", folder / "base", seed=5, overrides=small)
    backend = MegatronBackend(path=folder / "runs", max_model_len=512, **settings)
    model = ls.TrainableModel(name="kept", project="tests", base_model=str(base), lora=ls.LoraConfig(rank=8, alpha=16))
    await model.register(backend)
    return model, backend


def rank_of(run) -> int:
    """The one rank of the run's trainer, below its guard."""
    [rank] = children(run.trainer._child.pid)
    assert b"lockstep.engine.worker" in Path(f"/proc/{rank}/cmdline").read_bytes()
    return rank


def struck(monkeypatch, run, verb, number, times=1):
    """The rank gets signal `number` as soon as it is asked for `verb`, that many times, whichever trainer it is then."""
    from lockstep.trainer.client import Trainer

    call, left = Trainer.call, [times]

    async def striking(trainer, request, **options):
        if request.verb == verb and left[0]:
            left[0] -= 1
            os.kill(rank_of(run), number)
        return await call(trainer, request, **options)

    monkeypatch.setattr(Trainer, "call", striking)


async def step(model, backend):
    return await backend.train(model, [group(await roll_out(model, [words(20)], n=4))], CONFIG)


def jobs_of(model, backend, number):
    jobs = [job for job in read_jobs(backend.run_path(model)) if job.step == number and job.kind != "first_sync"]
    return [(job.kind, job.state, job.error_type) for job in jobs]


LOST, MADE = ("lora_step", "failed", "TrainerLostError"), ("lora_step", "done", None)


@pytest.mark.parametrize(
    "verb",
    [
        "train_step",
        "sync_adapter",
        pytest.param("save", marks=pytest.mark.slow),
        pytest.param("score", marks=pytest.mark.slow),
    ],
)
async def test_h9_a_trainer_that_is_killed_is_started_anew(running, monkeypatch, verb):
    model, backend = running
    before, lost = model.step, rank_of(backend.run_info(model))
    struck(monkeypatch, backend.run_info(model), verb, signal.SIGKILL)
    result = await step(model, backend)
    assert result.step == model.step == published_steps(backend.run_path(model))[-1] == before + 1
    assert result.metrics["trainer_restarts"] == 1.0
    assert result.metrics["mismatch_max"] < 1e-5
    assert rank_of(backend.run_info(model)) != lost
    assert jobs_of(model, backend, model.step) == [LOST, MADE]
    assert "trainer_restarts" not in (await step(model, backend)).metrics


@pytest.mark.parametrize("moment", ["in the step", "between requests"])
async def test_m4_a_rank_that_loops_is_found_in_ten_seconds(running, monkeypatch, caplog, moment):
    """In a step its heartbeats go on as a rule, and only its progress stands still; between requests it is silent."""
    from lockstep.trainer.life import Signs

    model, backend = running
    await step(model, backend)  # the trainer's speed is known from its second step on
    run, heard, struck_at = backend.run_info(model), Signs.heard, []

    def striking(life, event):
        if not struck_at and event.get("phase") == "forward_backward":
            struck_at.append(time.monotonic())
            os.kill(rank_of(run), LOOP)
        return heard(life, event)

    if moment == "in the step":
        monkeypatch.setattr(Signs, "heard", striking)
        # The signal may find the main thread with the channel's lock: then no heartbeat goes on.
        why = r"(?:stands still|is silent) during train_step, busy with \w+, since [\d:]+ \((\d+) s\): rank 0 at "
    else:
        struck(monkeypatch, run, "train_step", LOOP)
        why = r"is silent during train_step, since [\d:]+ \((\d+) s\)"
    result = await step(model, backend)
    assert result.metrics["trainer_restarts"] == 1.0
    said = re.search(f"trainer {why}.*; last lines of", caplog.text)
    assert said, caplog.text
    assert int(said[1]) <= 10


async def test_m4_a_rank_that_is_stopped_is_found_at_once(running, monkeypatch, caplog):
    model, backend = running
    stopped = rank_of(backend.run_info(model))
    struck(monkeypatch, backend.run_info(model), "train_step", signal.SIGSTOP)
    noticed = []

    class Clock(logging.Handler):
        def emit(self, record):
            noticed.append(time.monotonic())

    clock = Clock()
    logging.getLogger("lockstep.backends.megatron.supervision").addHandler(clock)
    groups = [group(await roll_out(model, [words(20)], n=4))]
    started = time.monotonic()
    try:
        result = await backend.train(model, groups, CONFIG)
    finally:
        logging.getLogger("lockstep.backends.megatron.supervision").removeHandler(clock)
    assert result.metrics["trainer_restarts"] == 1.0
    assert f"trainer is stopped (SIGSTOP, process {stopped}) during train_step" in caplog.text
    assert noticed[0] - started < 20.0  # twice LOOK_S, the step's own beginning, and what a busy machine adds
    assert not os.path.exists(f"/proc/{stopped}")


@pytest.mark.parametrize("who", ["engine", pytest.param("HTTP server", marks=pytest.mark.slow)])
async def test_m4_a_server_that_hangs_in_a_sync_is_replaced(running, monkeypatch, caplog, who):
    """The trainer lives, sends its heartbeats, and waits; so would the user, for five minutes."""
    from lockstep.trainer.client import Trainer

    model, backend = running
    run = backend.run_info(model)
    groups = [group(await roll_out(model, [words(20)], n=4))]
    rank, lost, call, asked = rank_of(run), run.server, Trainer.call, []

    async def hanging(trainer, request, **options):
        if request.verb == "sync_adapter" and not asked:
            asked.append(time.monotonic())
            os.kill(engine_core(lost) if who == "engine" else children(lost.child.pid)[0], signal.SIGSTOP)
        return await call(trainer, request, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "call", hanging)
        result = await backend.train(model, groups, CONFIG)
    assert result.metrics["server_restarts"] == 1.0
    assert f"{who}" in lost.hung
    assert float(re.search(r"\((\d+) s\), and was ended", lost.hung)[1]) <= 12  # HUNG_S and two looks
    assert rank_of(run) == rank  # the trainer was not taken for the one that hangs
    assert result.metrics["mismatch_max"] < 1e-5


async def test_h9_after_the_last_pause_the_step_fails_and_the_next_one_begins_anew(running, monkeypatch):
    """Last, since the step before may have left the trainer busy."""
    model, backend = running
    before = model.step
    monkeypatch.setattr(deadlines, "TRAINER_PAUSES_S", (0.1,))
    with monkeypatch.context() as patch:
        struck(patch, backend.run_info(model), "train_step", signal.SIGKILL, times=2)
        with pytest.raises(
            TrainerLostError, match=f"(?s)the trainer was lost 2 times in step {before + 1}, last: .*kept@{before}"
        ):
            await step(model, backend)
    assert model.step == before
    result = await step(model, backend)
    assert (result.step, result.metrics["trainer_restarts"]) == (before + 1, 1.0)


COLOCATED = ls.Placement(trainer="cpu", inference="cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "verb", "jobs"),
    [
        ({"placement": COLOCATED}, "train_step", [LOST, MADE]),
        ({"placement": COLOCATED}, "onload", [LOST, MADE]),
        ({"rollout_weights_mode": "merged"}, "train_step", None),
        ({"rollout_weights_mode": "merged"}, "sync", None),
        ({"rollout_weights_mode": "merged", "placement": COLOCATED}, "sync", None),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_h9_in_every_mode(runtime, tmp_path, monkeypatch, settings, verb, jobs):
    """Merged weights are published before they are sent: such a step is served, not made again."""
    model, backend = await registered(tmp_path, **settings)
    try:
        struck(monkeypatch, backend.run_info(model), verb, signal.SIGKILL)
        result = await step(model, backend)
        assert (result.step, result.metrics["trainer_restarts"]) == (1, 1.0)
        assert published_steps(backend.run_path(model)) == [0, 1]
        kinds = {"train_step": ["merged_step", "merged_step"], "sync": ["merged_step", "restarted_sync"]}
        if jobs is None:
            assert [job[0] for job in jobs_of(model, backend, 1)] == kinds[verb]
        else:
            assert jobs_of(model, backend, 1) == jobs
        assert (await step(model, backend)).metrics["mismatch_max"] < 1e-5
    finally:
        await backend.close()
