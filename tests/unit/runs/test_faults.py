"""Faults of the disk below a run: full, read-only, damaged files, two processes. Older steps stay, and the run goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import full_disk
from helpers import python_path
from lockstep.errors import StoreError
from lockstep.runs.store import RunStore

UNSHARE = shutil.which("unshare")
PAGES = (0, 1, 2, 3, 5, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 40)
"""Of 4,096 bytes, free when the step begins."""


def in_own_mounts(*command: str) -> subprocess.CompletedProcess[str]:
    options = ["-m"] if os.geteuid() == 0 else ["-Urm"]
    return subprocess.run(
        [UNSHARE or "unshare", *options, *command],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": python_path()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def _mounts(tmp_path_factory):
    """Skips where the system allows nobody a mount of his own."""
    folder = tmp_path_factory.mktemp("try")
    if UNSHARE is None or in_own_mounts("mount", "-t", "tmpfs", "tmpfs", str(folder)).returncode:
        pytest.skip("no mount namespaces here")


@pytest.mark.usefixtures("_mounts")
def test_a_disk_that_is_full_at_any_write_is_named_and_loses_nothing(tmp_path):
    ended = set()
    running = []
    for pages in PAGES:
        folder = tmp_path / str(pages)
        folder.mkdir()
        done = in_own_mounts(sys.executable, full_disk.__file__, str(folder), str(4096 * pages))
        assert done.returncode == 0, (pages, done.stderr)
        seen = json.loads(done.stdout)
        stage, _, message = seen["seen"].partition(":")
        ended.add(stage)
        running.append((pages, seen["seen"]))
        assert stage in ("done", "weights") or "No space left" in message or "disk is full" in message, seen
        assert seen["published"] in ([0, 1], [0, 1, 2])
        if "full" not in str(seen["metrics"]):  # a step that was trained keeps its metrics, on disk or not
            assert seen["metrics"] == seen["published"]
        assert len(seen["seen"].splitlines()) == 1
        assert seen["after"] == "done"
        assert all("loss" in values for values in seen["recorded"].values())
    assert {"trajectories", "weights", "done"} <= ended, running
    assert ended & {"job", "stage", "publish"}, running


@pytest.mark.usefixtures("_mounts")
def test_a_folder_that_turns_read_only_is_named(tmp_path):
    program = (
        "import ctypes, sys\n"
        "from pathlib import Path\n"
        "import full_disk\n"
        "from lockstep.runs.store import RunStore\n"
        "folder = Path(sys.argv[1])\n"
        "full_disk.mounted(folder)\n"
        "store = RunStore(folder / 'runs', 'project', 'name')\n"
        "store.claim(full_disk.IDENTITY)\n"
        "assert full_disk.one_step(store, 0) == 'done'\n"
        "place, mount = str(folder).encode(), ctypes.CDLL(None).mount\n"
        "assert mount(place, place, None, 4096, None) == 0\n"  # the same folder once more, and that one read-only
        "assert mount(None, place, None, 4096 | 32 | 1, None) == 0\n"
        "print(full_disk.one_step(store, 1))\n"
        "assert store.latest().number == 0\n"
    )
    done = in_own_mounts(sys.executable, "-c", program, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Read-only file system" in done.stdout or "readonly database" in done.stdout, done.stdout


@pytest.fixture
def run(tmp_path) -> Path:
    store = RunStore(tmp_path, "project", "name")
    store.claim(full_disk.IDENTITY)
    for number in range(2):
        assert full_disk.one_step(store, number) == "done"
    store.close()
    return store.path


def opened(run: Path) -> RunStore:
    store = RunStore(run.parents[1], "project", "name")
    try:
        store.claim(full_disk.IDENTITY)
        store.latest()
    except BaseException:
        store.close()
        raise
    return store


ARTEFACTS = ("run.sqlite", "steps/0001/manifest.json", "steps/0001/adapter/adapter_model.safetensors")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
@pytest.mark.parametrize("name", ARTEFACTS)
def test_each_damaged_artefact_is_named_and_the_step_before_is_whole(run, name, damage):
    file = run / name
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        for position in range(0, len(content), 4096 if name == "run.sqlite" else len(content)):
            content[position + 30 if position + 30 < len(content) else position] ^= 255
    changed = {"cut": content[: len(content) // 2], "flipped": content, "empty": b"", "gone": None}[damage]
    file.unlink()
    if changed is not None:
        file.write_bytes(changed)
    if name == "run.sqlite" and damage in ("empty", "gone"):  # all that it held comes back from the manifests
        store = opened(run)
        assert {step: values["loss"] for step, values in store.metrics().items()} == {0: 0.0, 1: 1.0}
        store.close()
        return
    with pytest.raises(StoreError, match=file.name):
        opened(run).latest()
    if name != "run.sqlite":
        shutil.rmtree(run / "steps" / "0001")  # what the error advises
        store = opened(run)
        assert store.published() == [0]
        assert full_disk.one_step(store, 1) == "done"
        store.close()


def test_a_damaged_trajectory_file_is_named(run):
    from lockstep.rollouts.parquet import read_parquet

    file = run / "trajectories" / "train" / "0001.parquet"
    intact = file.read_bytes()
    for content in (intact[: len(intact) // 2], b"", intact[:50] + bytes([intact[50] ^ 1]) + intact[51:]):
        file.write_bytes(content)
        with pytest.raises(StoreError, match=r"0001\.parquet"):
            read_parquet(file)


def test_metrics_that_the_disk_did_not_take_are_recorded_with_the_next(run, monkeypatch, caplog):
    store = RunStore(run.parents[1], "project", "name")
    record, refused = store._database.record, [2]

    def refusing(*arguments):
        if refused[0]:
            refused[0] -= 1
            raise StoreError("run.sqlite: database or disk is full")
        record(*arguments)

    monkeypatch.setattr(store._database, "record", refusing)
    assert full_disk.one_step(store, 2) == "done"
    assert "metrics of step 2 are not recorded yet" in caplog.text
    assert store.metrics()[2] == {"loss": 2.0, "late": 1.0}
    store.record(2, {"later": 3.0})
    assert store._database.metrics()[2] == {"loss": 2.0, "late": 1.0, "later": 3.0}
    assert {job.step: job.state for job in store.jobs.listed()}[2] == "done"
    store.close()
