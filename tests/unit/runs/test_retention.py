"""What a run keeps on disk, what it removes, and that removing breaks nothing, wherever it is interrupted."""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from lockstep.cli.steps import delete_steps, show_steps
from lockstep.errors import StoreError
from lockstep.runs import checkpoint
from lockstep.runs.retention import Retention, kept_steps, manifest_of, prune, reading, remove, remove_state
from lockstep.runs.store import RunStore, published_steps, read_checkpoint


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path, "project", "name")
    yield store
    store.close()


def publish(store: RunStore, number: int, size: int = 10, **metrics: float) -> None:
    staged = store.stage(number)
    for name in ("adapter/adapter_model.safetensors", "trainer/optimizer.safetensors"):
        (staged / name).parent.mkdir()
        (staged / name).write_bytes(os.urandom(size))
    store.publish(number, staged, metrics)


def states(store: RunStore) -> list[int]:
    return [step for step in store.published() if (store.steps_path / f"{step:04d}" / "trainer").is_dir()]


def test_b5_the_rule_keeps_the_newest_the_best_and_every_nth():
    metrics = {step: {"greedy_reward": value} for step, value in enumerate([0.1, 0.9, 0.9, 0.3, float("nan"), 0.2])}
    steps = list(range(12))
    assert kept_steps(Retention(), steps, metrics) == {9: "newest", 10: "newest", 11: "newest"}
    assert list(kept_steps(Retention(best="greedy_reward"), steps, metrics)) == [2, 9, 10, 11]
    assert list(kept_steps(Retention(newest=1, every=5), steps, metrics)) == [0, 5, 10, 11]
    assert list(kept_steps(Retention(newest=1, best="nothing"), steps, metrics, {4})) == [4, 11]


def test_b5_disk_stays_flat_and_what_is_needed_stays(store):
    """Twenty steps; step 0 is a KL reference, a rollout holds step 6. Metrics and manifests of all twenty can be read."""
    sizes = []
    for step in range(20):
        publish(store, step, 1000, loss=float(step), greedy_reward=1.0 if step == 4 else 0.0)
        if step == 1:
            store.reference(0, with_state=True)
        needed = {step, step - 1} | ({6} if step >= 6 else set())
        prune(store, Retention(best="greedy_reward"), needed, full_weights=True)
        sizes.append(sum(file.stat().st_size for file in store.steps_path.rglob("*") if file.is_file()))
    assert store.published() == [0, 4, 6, 17, 18, 19]
    assert states(store) == [0, 19]
    assert max(sizes) - sizes[-1] < 100
    assert [store.metrics()[step]["loss"] for step in range(20)] == list(range(20))
    assert [manifest_of(store.path, step)["metrics"]["loss"] for step in range(20)] == list(range(20))
    assert [store.step(step).resumable for step in store.published()] == [True, False, False, False, False, True]
    prune(store, Retention(), {19, 18}, full_weights=True)  # the rollout ended
    assert store.published() == [0, 17, 18, 19]
    with pytest.raises(StoreError, match=r"step 6 is not published in .* any more: it has"):
        store.step(6)
    publish(store, 20)


def test_b5_optimizer_states_stay_where_asked(store):
    for step in range(4):
        publish(store, step)
        prune(store, Retention(states=True), {step}, full_weights=False)
    assert states(store) == [1, 2, 3]
    prune(store, Retention(), {3}, full_weights=False)
    assert states(store) == [3]
    with pytest.raises(StoreError, match="retention removed its optimizer state"):
        store.reference(2, with_state=True)
    assert store.reference(2, with_state=False).name == "0002"


def test_b5_a_kl_reference_is_hashed_once(store, monkeypatch):
    for step in range(3):
        publish(store, step)
    hashed = []
    digest = checkpoint.file_digest
    monkeypatch.setattr(checkpoint, "file_digest", lambda file: hashed.append(file) or digest(file))
    folders = {store.reference(0, with_state=True) for _ in range(5)}
    assert folders == {store.steps_path / "0000"}
    assert len(hashed) == 2  # its two files
    shutil.rmtree(store.steps_path / "0000")
    with pytest.raises(StoreError, match="step 0 is not published"):
        store.reference(0, with_state=True)


def test_b5_a_step_that_another_process_reads_stays(store):
    for step in range(3):
        publish(store, step)
    _, first = read_checkpoint(store.path, 0)
    with reading(first):
        assert not remove(store, 0)
        assert not remove_state(store, 0)
        assert first.resumable
    assert remove(store, 0)
    with pytest.raises(StoreError, match="was removed meanwhile"), reading(first):
        pass
    with pytest.raises(StoreError, match="step 2 is the last one"):
        remove(store, 2)


def _train_for_ever(path: Path) -> None:
    store = RunStore(path, "project", "name")
    step = max(store.published(), default=-1) + 1
    while True:
        publish(store, step, 200_000)
        prune(store, Retention(newest=2, every=7), {step}, full_weights=False)
        step += 1


def test_b5_killed_at_any_moment_only_whole_steps_remain(tmp_path):
    context, run = multiprocessing.get_context("fork"), tmp_path / "project" / "name"
    last = -1
    for _ in range(8):
        writer = context.Process(target=_train_for_ever, args=(tmp_path,))
        writer.start()
        deadline = time.monotonic() + 30
        while max(published_steps(run), default=-1) < last + 4 and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.02))
        assert writer.pid
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        store = RunStore(tmp_path, "project", "name")
        steps = store.published()
        assert steps[-1] >= last + 4
        newest = store.latest()
        assert newest is not None
        assert newest.resumable
        for step in steps:
            store.step(step)  # whole, or marked
        prune(store, Retention(newest=2, every=7), set(), full_weights=False)
        assert [step for step in store.published() if step % 7] == [step for step in steps[-2:] if step % 7]
        assert states(store) == steps[-1:]
        assert not [file for file in store.steps_path.iterdir() if file.name.startswith(".")]
        assert [manifest_of(run, step)["step"] for step in range(steps[-1] + 1)] == list(range(steps[-1] + 1))
        last = steps[-1]
        store.close()


@pytest.mark.parametrize("removal", [remove, remove_state])
def test_b5_a_removal_that_ends_half_way_leaves_whole_steps(tmp_path, monkeypatch, removal):
    """The process dies when the first file is gone; the next start clears the rest away."""
    store = RunStore(tmp_path, "project", "name")
    for step in range(3):
        publish(store, step)

    def die(folder: Path, **_options: object) -> None:
        next(file for file in sorted(folder.rglob("*")) if file.is_file()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            removal(store, 1)
    store.close()
    again = RunStore(tmp_path, "project", "name")
    assert again.published() == ([0, 2] if removal is remove else [0, 1, 2])
    assert [again.step(step).resumable for step in again.published()] == [
        True,
        *[False] * (removal is remove_state),
        True,
    ]
    assert states(again) == [0, 2]
    assert [manifest_of(again.path, step)["step"] for step in range(3)] == [0, 1, 2]
    assert not [file for file in again.steps_path.iterdir() if file.name.startswith(".")]
    again.close()


def test_lockstep_steps_lists_and_deletes(store):
    for step in range(5):
        publish(store, step, greedy_reward=0.5, reward=0.25)
    store.reference(1, with_state=False)
    rule = {"keep_newest": 1, "keep_best": "greedy_reward", "keep_every": 3, "keep_optimizer_states": False}
    store.keep_settings(rule | {"lora.rank": 8})
    said = io.StringIO()
    with pytest.raises(StoreError, match="in use by process"):
        delete_steps(store.path, [0], Console(file=said))
    store.close()
    for step, message in ((1, "KL reference"), (4, "the last one"), (9, "not published")):
        with pytest.raises(StoreError, match=message):
            delete_steps(store.path, [0, step], Console(file=said))
    assert published_steps(store.path) == [0, 1, 2, 3, 4]
    delete_steps(store.path, [0, 2], Console(file=said))
    assert published_steps(store.path) == [1, 3, 4]
    said = io.StringIO()
    show_steps(store.path, Console(file=said, width=120))
    lines = [line.split() for line in said.getvalue().splitlines()]
    assert [line[0] for line in lines] == ["step", "1", "3", "4"]
    assert lines[1][-2:] == ["KL", "reference"]
    assert lines[2][-2:] == ["every", "3"]
    assert lines[3][-4:] == ["yes", "0.250", "0.500", "newest"]
    with pytest.raises(StoreError, match="is not a run"):
        show_steps(store.path.parent, Console(file=said))
