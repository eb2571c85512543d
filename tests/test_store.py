"""The run's folder: atomic publish, refusal of damage, resume after a kill at any moment."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.backends.megatron.settings import sampling_seed
from lockstep.errors import StoreError
from lockstep.runs.store import RunStore, published_steps, read_checkpoint


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path, "project", "name")
    yield store
    store.close()


def publish(store, number, content=b"weights"):
    staged = store.stage(number)
    (staged / "adapter").mkdir()
    (staged / "adapter" / "adapter_model.safetensors").write_bytes(content)
    return store.publish(number, staged, {"loss": 0.5}, {"position": number})


def test_steps_come_back_as_published(store):
    publish(store, 0, b"zero")
    publish(store, 1, b"one")
    step = store.latest()
    assert step is not None
    assert step.number == 1
    assert (step.adapter / "adapter_model.safetensors").read_bytes() == b"one"
    assert step.state == {"position": 1}
    assert store.metrics() == {0: {"loss": 0.5}, 1: {"loss": 0.5}}


def test_steps_follow_each_other(store):
    with pytest.raises(StoreError, match="step 1 can't follow nothing"):
        publish(store, 1)
    publish(store, 0)
    with pytest.raises(StoreError, match="step 0 can't follow 0"):
        publish(store, 0)


@settings(max_examples=20, deadline=None)
@given(content=st.binary(min_size=1, max_size=64), position=st.integers(0, 63), flip=st.integers(1, 255))
def test_any_changed_byte_is_found(tmp_path_factory, content, position, flip):
    store = RunStore(tmp_path_factory.mktemp("run"), "project", "name")
    step = publish(store, 0, content)
    file = step.adapter / "adapter_model.safetensors"
    damaged = bytearray(content)
    damaged[position % len(content)] ^= flip
    file.write_bytes(bytes(damaged))
    with pytest.raises(StoreError, match=r"adapter_model\.safetensors was changed"):
        store.latest()
    store.close()


def test_missing_and_added_files_are_found(store):
    step = publish(store, 0)
    (step.path / "more").write_text("x")
    with pytest.raises(StoreError, match="more is not in the manifest"):
        store.latest()
    (step.path / "more").unlink()
    (step.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(StoreError, match="is missing"):
        store.latest()


def test_a_run_has_one_owner_and_one_identity(store, tmp_path):
    with pytest.raises(StoreError, match="in use by another process"):
        RunStore(tmp_path, "project", "name")
    store.claim({"base_model": "a", "rank": 8})
    store.claim({"base_model": "a", "rank": 8})
    with pytest.raises(StoreError, match='base_model = "a", not "b"'):
        store.claim({"base_model": "b", "rank": 8})


def _publish_for_ever(path):
    store = RunStore(path, "project", "name")
    number = len(store.published())
    while True:
        publish(store, number, os.urandom(200_000))
        number += 1


def test_killed_at_any_moment_only_whole_steps_remain(tmp_path):
    """SIGKILL at random times; every step that has its name is complete, and the next process goes on after it."""
    context = multiprocessing.get_context("fork")
    seen = 0
    for delay in (0.05, 0.11, 0.17, 0.23):
        writer = context.Process(target=_publish_for_ever, args=(tmp_path,))
        writer.start()
        deadline = time.monotonic() + 30
        while len(published_steps(tmp_path / "project" / "name")) <= seen and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        assert writer.pid
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        store = RunStore(tmp_path, "project", "name")
        steps = store.published()
        assert steps == list(range(len(steps)))
        assert len(steps) > seen
        for number in steps[seen:]:
            assert store.step(number).state == {"position": number}
        assert not list(store.steps_path.glob(".staging-*"))
        seen = len(steps)
        store.close()


def test_damage_is_named(store, tmp_path):
    """A manifest that is no JSON, a copy that somebody made of a step, a database that is none, a folder that can't be made."""
    step = publish(store, 0)
    (store.steps_path / "0000.bak").mkdir()
    (store.steps_path / "0000.bak" / "manifest.json").write_text("{}")
    assert store.published() == [0]
    manifest = step.path / "manifest.json"
    for text in ("", "{", "[]", "{}"):
        manifest.write_text(text)
        with pytest.raises(StoreError, match=r"manifest\.json is"):
            store.latest()
    store.close()
    (store.path / "run.sqlite").write_bytes(b"no database" * 100)
    for read in (lambda: RunStore(tmp_path, "project", "name"), lambda: read_checkpoint(store.path, None)):
        with pytest.raises(StoreError, match=r"run\.sqlite: file is not a database"):
            read()
    (store.path / "run.sqlite").unlink()
    RunStore(tmp_path, "project", "name").close()  # a failed start leaves no lock behind
    with pytest.raises(StoreError, match="can't be written"):
        RunStore(store.path / "run.sqlite", "project", "name")


def test_the_manifest_is_plain_json(store):
    step = publish(store, 0)
    manifest = json.loads((step.path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter/adapter_model.safetensors"}
    assert manifest["step"] == 0


def test_a8_each_server_of_a_run_samples_other_noise(tmp_path):
    """A resumed run once sampled the replies of its first steps again: every server began with the same seed."""
    starts = []
    for _ in range(3):
        store = RunStore(tmp_path, "project", "name")
        starts += [store.next_server_start(), store.next_server_start()]
        store.close()
    assert starts == list(range(6))
    seeds = [sampling_seed(7, start) for start in starts]
    assert seeds[0] == 7
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert seeds == [sampling_seed(7, start) for start in starts]
