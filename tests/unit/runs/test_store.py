"""The run's folder: atomic publish, refusal of damage, resume after a kill at any moment."""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.backends.megatron.plan.settings import sampling_seed
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


def test_a_teacher_is_a_published_step_of_the_same_base_model(store, tmp_path):
    store.claim({"base_model": "A"})
    others = {}
    for name, base in (("same", "A"), ("other", "B")):
        others[name] = RunStore(tmp_path, "project", name)
        others[name].claim({"base_model": base})
        publish(others[name], 0)
        others[name].close()
    path = others["same"].steps_path / "0000"
    assert store.teacher(path, with_state=False) == path.resolve()
    with pytest.raises(StoreError, match="is a step of B, this run trains A"):
        store.teacher(others["other"].steps_path / "0000", with_state=False)
    with pytest.raises(StoreError, match="is no step: give PATH"):
        store.teacher(path / "adapter", with_state=False)
    with pytest.raises(StoreError, match="step 3 is not published"):
        store.teacher(path.with_name("0003"), with_state=False)


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
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        RunStore(tmp_path, "project", "name")
    store.claim({"base_model": "a", "rank": 8})
    store.claim({"base_model": "a", "rank": 8})
    with pytest.raises(StoreError, match="base_model = 'a', not 'b'"):
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
    shutil.rmtree(step.path)
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


def reopened(store: RunStore) -> RunStore:
    store.close()
    return RunStore(store.path.parents[1], store.path.parent.name, store.path.name)


def test_h6_a_step_without_its_manifest_is_named_at_the_start(store):
    publish(store, 0)
    step = publish(store, 1)
    (step.path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"steps/0001 has no manifest\.json: .* delete .*0001 to resume before it"):
        reopened(store)
    shutil.rmtree(step.path)
    again = reopened(store)
    assert publish(again, 1).number == 1
    again.close()


@pytest.mark.parametrize("lost", ["emptied", "missing"])
def test_h7_a_lost_identity_comes_from_the_manifests(store, lost):
    """An emptied or missing run.sqlite once let another base model train on."""
    store.claim({"base_model": "a", "rank": 8})
    publish(store, 0)
    claimed = read_checkpoint(store.path, None)[0]
    store.close()
    for file in store.path.glob("run.sqlite*"):
        file.unlink()
    if lost == "emptied":
        (store.path / "run.sqlite").touch()
    again = reopened(store)
    with pytest.raises(StoreError, match="base_model = 'a', not 'b'"):
        again.claim({"base_model": "b", "rank": 8})
    again.claim({"base_model": "a", "rank": 8})
    again.close()
    assert claimed == {"base_model": "a", "rank": 8, "key": claimed["key"]}
    assert read_checkpoint(store.path, None)[0] == claimed


def test_h7_steps_of_nobody_are_refused(store):
    """A run of an earlier version, whose manifests don't say what it trains."""
    step = publish(store, 0)
    manifest = json.loads((step.path / "manifest.json").read_text())
    old = {name: value for name, value in manifest.items() if name not in ("identity", "digest")} | {"schema": 1}
    (step.path / "manifest.json").write_text(json.dumps(old))
    again = reopened(store)
    assert again.latest().number == 0  # readable as it is
    with pytest.raises(StoreError, match="doesn't say of which model"):
        again.claim({"base_model": "b"})
    again.close()


def _commits_for_ever(path):
    store = RunStore(path, "project", "name")
    number = 0
    while True:
        store.record(0, {f"metric {number % 50}": float(number), "more": float(number)})
        number += 1


def test_h8_a_commit_that_was_cut_off_is_no_hindrance_to_readers(store, tmp_path):
    """SIGKILL inside commits: whoever reads next, without the run's lock, gets what was committed."""
    store.claim({"base_model": "a"})
    publish(store, 0)
    store.close()
    for delay in (0.1, 0.13, 0.17):
        writer = multiprocessing.get_context("fork").Process(target=_commits_for_ever, args=(tmp_path,))
        writer.start()
        time.sleep(0.4 + delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert read_checkpoint(store.path, None)[0]["base_model"] == "a"
    again = reopened(store)
    assert again.metrics()[0]["more"] > 0
    again.close()


def test_h8_a_hot_journal_is_undone_by_a_reader(store):
    """What a process of an earlier version leaves, which kept a rollback journal, when it is killed inside a commit."""
    store.claim({"base_model": "a"})
    publish(store, 0)
    store.close()
    program = (
        "import os, signal, sqlite3, sys\n"
        "database = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "database.execute('PRAGMA journal_mode = DELETE')\n"
        "database.execute('PRAGMA cache_size = 1')\n"
        "database.execute('BEGIN')\n"
        'database.execute("UPDATE identity SET value = \'" + \'"b"\' + "\'")\n'
        "database.executemany('INSERT INTO settings VALUES (?, ?)', [(str(n), '0' * 900) for n in range(3000)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(store.path / "run.sqlite")], check=False)
    assert (store.path / "run.sqlite-journal").exists()
    assert read_checkpoint(store.path, None)[0]["base_model"] == "a"


def test_m2_metrics_that_were_not_recorded_come_from_the_manifest(store, monkeypatch):
    publish(store, 0)
    monkeypatch.setattr(store, "record", lambda step, metrics: None)  # killed after the rename
    publish(store, 1)
    again = reopened(store)
    assert again.metrics() == {0: {"loss": 0.5}, 1: {"loss": 0.5}}
    again.close()


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_m8_any_flip_in_a_manifest_is_found(tmp_path_factory, position, bit):
    store = RunStore(tmp_path_factory.mktemp("run"), "project", "name")
    store.claim({"base_model": "a"})
    file = publish(store, 0).path / "manifest.json"
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[position % len(damaged)] ^= 1 << bit
    file.write_bytes(bytes(damaged))
    try:
        same = json.loads(damaged) == json.loads(content)  # a flip between two fields may change nothing
    except ValueError:
        same = False
    if same:
        assert store.latest() is not None
    else:
        with pytest.raises(StoreError, match=r"manifest\.json"):
            store.latest()
    store.close()


def test_m8_a_damaged_identity_is_named(store):
    store.claim({"base_model": "a"})
    publish(store, 0)
    store.close()
    with sqlite3.connect(store.path / "run.sqlite") as database:
        database.execute("UPDATE identity SET value = 'a\"' WHERE key = 'base_model'")
    database.close()
    for read in (lambda: reopened(store), lambda: read_checkpoint(store.path, None)):
        with pytest.raises(StoreError, match=r"run\.sqlite is damaged: identity has base_model"):
            read()


def test_m10_nobody_else_can_read_a_run(store):
    publish(store, 0)
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700


def test_m1_what_a_killed_step_left_goes_at_the_next_start(tmp_path):
    store = RunStore(tmp_path, "project", "name")
    folders = [store.path / name for name in ("batches", "trajectories/train", "weights/abc")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    left = [folders[0] / "0003.safetensors", folders[1] / ".0003.parquet.77", folders[2] / "0"]
    kept = folders[1] / "0003.parquet"
    for file in (*left, kept):
        file.touch()
    store.close()
    RunStore(tmp_path, "project", "name").close()
    assert [file for file in (*left, kept) if file.exists()] == [kept]


def test_a_renamed_metric_of_an_earlier_version_keeps_its_meaning(store):
    publish(store, 0)
    store.record(0, {"picks_differ": 0.25})
    assert store.metrics()[0]["expert_choices_differ"] == 0.25
