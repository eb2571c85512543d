"""The asynchronous loop's tasks and waits, on a backend that publishes real steps and trains nothing."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest

import lockstep as ls
from lockstep.backends.base import Endpoint, ServerLoad, TrainResult
from lockstep.errors import ConfigError, RolloutError, ServerError
from lockstep.metrics.names import is_known
from lockstep.rollouts.versions import oldest_step
from lockstep.runs.store import RunStore
from random_batches import choice


class Backend:
    """A step takes `train_s`; each is a real checkpoint of the run's store."""

    def __init__(self, path, train_s=0.0, slots=16, colocated=False):
        self.store = RunStore(path, "tests", "piped")
        self.train_s, self.slots, self.colocated = train_s, slots, colocated
        self.lost = ""
        self.kv_use = 0.1
        self.ages: list[int] = []
        self.positions: list[int] = []
        if self.store.latest() is None:
            self.store.publish(0, self.store.stage(0), {})

    async def register(self, model):
        return self.store.published()[-1]

    def endpoint(self, model):
        return Endpoint("http://127.0.0.1:1/v1", "key", self.slots, colocated=self.colocated)

    def run_path(self, model):
        return self.store.path

    def record(self, model, metrics, step=None):
        assert all(is_known(name) for name in metrics)
        self.store.record(model.step if step is None else step, metrics)

    async def problem(self, model):
        return self.lost

    async def load(self, model):
        return ServerLoad(self.kv_use, 0.0)

    async def train(self, model, groups, config=None, attach=None):
        ages = [model.step - oldest_step(group) for group in groups]
        assert max(ages) <= config.max_steps_off_policy
        await asyncio.sleep(self.train_s)
        staged = self.store.stage(model.step + 1)
        state = await attach(staged)
        self.store.publish(model.step + 1, staged, {}, state)
        self.ages += ages
        self.positions += [each["position"] for each in state["pipeline"]["trained"]]
        model._advance(model.step + 1)
        return TrainResult(model.step, {"loss": 0.0, "seconds_train": 0.0, "seconds_sync": 0.0}, staged)


class Rollouts:
    """One reply of a token; each lasts for what `seconds` gives for its number."""

    def __init__(self, seconds=lambda number: 0.001, fail=lambda number: False):
        self.seconds, self.fail = seconds, fail
        self.begun = self.running = self.most = 0

    async def __call__(self, model, scenario, temperature):
        name = model.inference_name()
        number = self.begun
        if temperature:
            self.begun, self.running = self.begun + 1, self.running + 1
            self.most = max(self.most, self.running)
            try:
                await asyncio.sleep(self.seconds(number))
            finally:
                self.running -= 1
            if self.fail(number):
                raise ValueError("this one fails")
        said = choice([1], [2], weight_versions=[{"version": name, "start": 0, "end": 1}])
        return ls.Trajectory(messages_and_choices=[{"role": "user", "content": "x"}, said], reward=float(number % 2))


async def piped(backend, rollout, steps=8, bound=2, limits=None, **task):
    model = ls.TrainableModel(name="piped", project="tests", base_model="none")
    await model.register(backend)
    settings = {"groups_per_step": 2, "group_size": 2, "evaluate_every": 4, "steps": steps} | task
    return model, ls.PipelineTrainer(
        model,
        backend,
        rollout=rollout,
        scenarios=list(range(5)),
        config=ls.TrainConfig(max_steps_off_policy=bound),
        pipeline=ls.PipelineConfig(**limits or {}),
        **settings,
    )


@pytest.fixture
def backend(tmp_path):
    backend = Backend(tmp_path)
    yield backend
    backend.store.close()


@pytest.mark.parametrize("limits", [{}, {"queue_groups": 1}, {"window": 0}, {"window": 9, "queue_groups": 4}])
async def test_whatever_the_limits_every_group_is_trained_once_and_in_time(backend, limits):
    """Slow and failing rollouts, also where the limits let groups become too old: those are dropped and drawn again."""
    draws = random.Random()
    rollout = Rollouts(lambda _: draws.choice((0.0, 0.001, 0.03)), lambda number: number % 23 == 22)
    backend.train_s = 0.004
    model, trainer = await piped(backend, rollout, steps=12, limits=limits, max_exceptions=4)
    async with asyncio.timeout(30):
        outcome = await trainer.run()
    assert outcome.step == model.step == 12
    assert set(Counter(backend.positions).values()) == {1}
    assert len(backend.positions) == 24
    assert model.leased_steps() == frozenset()
    assert "the trainer waited" in trainer.advice


async def test_without_staleness_nothing_overlaps(backend):
    backend.train_s = 0.01
    _, trainer = await piped(backend, Rollouts(), bound=0)
    await trainer.run()
    assert set(backend.ages) == {0}
    assert backend.positions == list(range(16))
    assert "take turns" in trainer.advice


async def test_slow_rollouts_and_slow_training_are_told_apart(tmp_path):
    """The two timers, each where the other side is much slower, and a sentence of advice for each."""
    cases = (("rollouts", 0.0, 0.5, "slow groups"), ("trainer", 0.2, 0.0, "the trainer is busy"))
    for name, train_s, rollout_s, said in cases:
        backend = Backend(tmp_path / name, train_s)
        places = {"least_concurrent": 16, "max_concurrent": 16}
        _, trainer = await piped(backend, Rollouts(lambda _, s=rollout_s: s), limits=places, evaluate_every=100)
        await trainer.run()
        backend.store.close()
        metrics = backend.store.metrics()
        waits = {key: sum(metrics[step][f"wait_for_{key}"] for step in range(2, 8)) for key in ("rollouts", "trainer")}
        assert waits[name] > 2 * waits["trainer" if name == "rollouts" else "rollouts"]
        assert said in trainer.advice


async def test_no_more_rollouts_run_than_there_are_places(backend):
    rollout = Rollouts(lambda number: 0.002)
    _, trainer = await piped(backend, rollout, limits={"max_concurrent": 3, "least_concurrent": 3})
    await trainer.run()
    assert rollout.most == 3


async def test_a_lost_server_ends_the_run_though_other_rollouts_last(backend):
    """A rollout that fails shows it at once; the rest of its group would last for a minute."""

    def fails(number):
        if number == 9:
            backend.lost = "the server ended"
        return number == 9

    model, trainer = await piped(backend, Rollouts(lambda number: 60.0 if number == 8 else 0.001, fails))
    started = time.monotonic()
    with pytest.raises(ServerError, match="the server ended; what was trained is published"):
        await trainer.run()
    assert time.monotonic() - started < 10
    assert backend.store.published()[-1] == model.step
    assert len(backend.positions) == 2 * model.step


async def test_too_many_failures_end_the_run(backend):
    _, trainer = await piped(backend, Rollouts(fail=lambda number: True), max_exceptions=3)
    with pytest.raises(RolloutError, match=r"rollouts for step 1: .*this one fails"):
        await trainer.run()


async def test_a_run_goes_on_from_the_queue_of_its_checkpoint(tmp_path):
    positions: list[int] = []
    for steps in (3, 4, 9):
        backend = Backend(tmp_path, train_s=0.004)
        _, trainer = await piped(backend, Rollouts(lambda number: 0.02 * (number % 4 == 3)), steps=steps)
        await trainer.run()
        positions += backend.positions
        backend.store.close()
    assert sorted(positions) == list(range(18))


async def test_the_target_ends_the_run_early(backend):
    backend.train_s = 0.002
    _, trainer = await piped(backend, Rollouts(), steps=500, evaluate_every=1, stop_at_reward=0.0)
    outcome = await trainer.run()
    assert outcome.reached
    assert outcome.step < 5


async def test_a_colocated_backend_is_refused(tmp_path):
    backend = Backend(tmp_path, colocated=True)
    with pytest.raises(ConfigError, match="mode = pipeline needs GPUs of their own"):
        await piped(backend, Rollouts())
    backend.store.close()
