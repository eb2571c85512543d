"""A fork begins at a step of another run and leaves that run as it is."""

from __future__ import annotations

import pytest

import full_disk
from lockstep.errors import StoreError
from lockstep.runs.checkpoint import STATELESS
from lockstep.runs.fork import fork
from lockstep.runs.store import RunStore


@pytest.fixture
def run(tmp_path):
    store = RunStore(tmp_path, "project", "name")
    store.claim(full_disk.IDENTITY)
    for number in range(4):
        assert full_disk.one_step(store, number) == "done"
    store.close()
    return store.path


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_fork_has_the_step_and_goes_on_from_it(run, tmp_path):
    before = contents(run / "steps")
    made = fork(run, 2, "other")
    assert made == tmp_path.resolve() / "project" / "other"
    store = RunStore(tmp_path, "project", "other")
    store.claim(full_disk.IDENTITY)
    latest = store.latest()
    assert latest is not None
    assert store.published() == [2]
    assert store.metrics()[2]["loss"] == 2.0
    for name in latest.manifest["files"]:
        assert (latest.path / name).read_bytes() == before[f"0002/{name}"]
    assert full_disk.one_step(store, 3) == "done"
    store.close()
    assert contents(run / "steps") == before


def test_what_cannot_be_forked_is_named_and_leaves_nothing(run, tmp_path):
    with pytest.raises(StoreError, match="step 9 is not published"):
        fork(run, 9, "none")
    (run / "steps" / "0001" / STATELESS).touch()
    with pytest.raises(StoreError, match="no optimizer state"):
        fork(run, 1, "none")
    assert not (tmp_path / "project" / "none").exists()
    fork(run, 2, "other")
    with pytest.raises(StoreError, match="has steps already, the last is 2"):
        fork(run, 3, "other")


def test_a_relative_and_an_absolute_base_model_are_one_run(tmp_path, monkeypatch):
    """What a run's identity says of its base model: the folder, however it was named."""
    from lockstep.models.checkpoint.hub import checkpoint_folder

    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    named = {
        str(checkpoint_folder(name))
        for name in ("base", "./base", str(tmp_path / "base"), "../" + tmp_path.name + "/base")
    }
    assert named == {str((tmp_path / "base").resolve())}
