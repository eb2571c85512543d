"""The asynchronous loop on real parts: rollouts go on while the trainer works and while a new step reaches the server.

One server and one trainer for the whole file; the last test kills the server.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter

import pytest

import lockstep as ls
from frozen_processes import engine_core
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.errors import RolloutError, ServerError
from lockstep.metrics.names import is_known
from lockstep.models.tiny.write import write_tiny
from lockstep.rollouts.parquet import read_parquet
from lockstep.rollouts.versions import oldest_step
from lockstep.runs.checkpoint import read_manifest

pytestmark = pytest.mark.server
BOUND = 2
WORDS = ("red", "green", "blue", "black", "white")


@pytest.fixture(scope="module")
async def running(runtime, tmp_path_factory):
    """(model, backend) at step 0."""
    folder = tmp_path_factory.mktemp("pipeline")
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    base = write_tiny("qwen3", folder / "base", seed=5, overrides=small)
    backend = MegatronBackend(path=folder / "runs", max_model_len=256, keep_newest=99)
    model = ls.TrainableModel(name="piped", project="tests", base_model=str(base), lora=ls.LoraConfig(rank=8, alpha=16))
    await model.register(backend)
    yield model, backend
    await backend.close()


class Rollouts:
    """Two turns of a few tokens. The rollouts whose number is in `slow` pause in between, and those in `broken` raise."""

    def __init__(self, slow=(), broken=(), pause_s=3.0):
        self.slow, self.broken, self.pause_s, self.begun = slow, broken, pause_s, 0

    async def __call__(self, model, scenario, temperature):
        number, self.begun = self.begun, self.begun + (temperature > 0)
        kept = ls.Trajectory(messages_and_choices=[{"role": "user", "content": scenario}], reward=0.0)
        for turn in range(2):
            reply = await model.openai_client().chat.completions.create(
                model=model.inference_name(), messages=kept.messages, temperature=temperature, max_tokens=6
            )
            kept.messages_and_choices += [reply.choices[0], {"role": "user", "content": "more"}]
            if turn == 0 and temperature > 0 and number in self.slow:
                await asyncio.sleep(self.pause_s)
        if temperature > 0 and number in self.broken:
            raise ValueError("this one fails")
        kept.reward = float(len("".join(choice.message.content for choice in kept.choices)) % 5)
        return kept


def trainer(running, rollout, more_steps, **settings):
    model, backend = running
    config = ls.TrainConfig(learning_rate=1e-3, max_steps_off_policy=BOUND)
    task = {"groups_per_step": 2, "group_size": 2, "evaluate_every": 100, "evaluate_scenarios": 2} | settings
    return ls.PipelineTrainer(
        model,
        backend,
        rollout=rollout,
        scenarios=[f"say {word}" for word in WORDS],
        config=config,
        steps=model.step + more_steps,
        **task,
    )


def trained(running):
    """By step, the positions that it was trained on, as its manifest has them; and its groups."""
    _, backend = running
    model, path = running[0], backend.run_path(running[0])
    states = {n: read_manifest(path / "steps" / f"{n:04d}")["state"]["pipeline"] for n in range(1, model.step + 1)}
    groups = {n: read_parquet(path / "trajectories" / "train" / f"{n:04d}.parquet") for n in states}
    return {n: [each["position"] for each in state["trained"]] for n, state in states.items()}, groups


async def test_rollouts_overlap_with_training_and_no_token_is_older_than_the_bound(running):
    """Slow and broken rollouts among them: every group is trained once, a rollout keeps its version through a sync."""
    model, backend = running
    rows = []
    pipeline = trainer(running, Rollouts(slow={0, 9, 17}, broken={5, 12}), 6, max_exceptions=2)
    pipeline.on_step = rows.append
    outcome = await pipeline.run()
    assert outcome.step == model.step == 6
    assert [row.step for row in rows] == list(range(7))
    positions, groups = trained(running)
    counted = Counter(position for each in positions.values() for position in each)
    assert set(counted.values()) == {1}
    assert counted.total() == 12
    ages = [step - 1 - oldest_step(group) for step, of_step in groups.items() for group in of_step]
    assert max(ages) <= BOUND
    assert max(ages) > 0, "nothing overlapped"
    for of_step in groups.values():
        for each in (trajectory for group in of_step for trajectory in group.trajectories):
            assert len({span["version"] for choice in each.choices for span in choice.weight_versions}) == 1
    metrics = backend.run_info(model).store.metrics()
    assert not {name for of_step in metrics.values() for name in of_step if not is_known(name)}
    assert metrics[6]["steps_off_policy"] == max(step - 1 - oldest_step(group) for step in (6,) for group in groups[6])
    assert sum(metrics[step]["groups_failed"] for step in range(1, 7)) >= 1
    load = await backend.load(model)
    assert load is not None
    assert 0 <= load.kv_use < 1
    assert load.preemptions == 0
    assert {0, 6} <= {row.step for row in rows if row.greedy == row.greedy}
    assert "the trainer waited" in pipeline.advice


async def test_a_run_goes_on_with_what_was_ready(running):
    """A run that was stopped trains the groups of its queue, and draws those that were under way again."""
    model, _ = running
    stopped = trainer(running, Rollouts(slow={6}, pause_s=60.0), 50)
    under_way = asyncio.create_task(stopped.run())
    before = model.step
    async with asyncio.timeout(100):
        while model.step < before + 2:
            await asyncio.sleep(0.01)
    under_way.cancel()
    with pytest.raises(asyncio.CancelledError):
        await under_way
    await trainer(running, Rollouts(), 4).run()
    positions, _ = trained(running)
    counted = Counter(position for each in positions.values() for position in each)
    assert set(counted.values()) == {1}
    assert sorted(counted) == list(range(len(counted))), "a position was forgotten"


async def test_too_many_failures_end_the_run(running):
    model, backend = running
    with pytest.raises(RolloutError, match=r"rollouts for step \d+: .*this one fails.*max_exceptions"):
        await trainer(running, Rollouts(broken=range(100)), 1, max_exceptions=3).run()
    file = backend.run_path(model) / "trajectories" / "train" / f"{model.step + 1:04d}.parquet"
    assert "this one fails" in read_parquet(file)[0].exceptions[0].message


async def test_a_lost_server_ends_the_run_and_what_was_trained_is_published(running):
    model, backend = running
    pipeline = trainer(running, Rollouts(), 50)
    under_way = asyncio.create_task(pipeline.run())
    before = model.step
    async with asyncio.timeout(100):
        while model.step < before + 1:
            await asyncio.sleep(0.01)
    os.kill(engine_core(backend.run_info(model).server), signal.SIGKILL)
    with pytest.raises(ServerError):
        await under_way
    assert backend.run_info(model).store.published()[-1] >= before + 1
    positions, _ = trained(running)
    assert set(Counter(position for each in positions.values() for position in each).values()) == {1}
