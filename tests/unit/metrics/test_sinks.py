"""Metrics sinks: each one holds what the run recorded, each value once, and one that fails gets a
warning and stops nothing.
"""

from __future__ import annotations

import importlib
import json
import logging
import struct
import threading
import time

import pytest

from lockstep.config import deadlines
from lockstep.config.megatron import MegatronConfig
from lockstep.errors import ConfigError
from lockstep.metrics.feed import Feeds
from lockstep.metrics.sinks import ALWAYS, find_sinks, named_sinks
from lockstep.metrics.sinks.base import SinkKind, SinkRun
from lockstep.runs.database import read_identity
from lockstep.runs.store import RunStore

PARTS = [(0, {"greedy_reward": 0.25}), (1, {"loss": 0.5, "rollout/turns taken": 2.0}), (1, {"seconds_sync": 0.125})]
RECORDED = [
    ("evaluation/greedy_reward", 0, 0.25),
    ("loss/loss", 1, 0.5),
    ("rollout/turns taken", 1, 2.0),
    ("time/seconds_sync", 1, 0.125),
]


def sink_run(path, key="0" * 32):
    return SinkRun(path, "project", "name", key, {"lora": {"rank": 4}, "dtype": "float32"})


def written(kind, run, parts=PARTS, history=None):
    feeds = Feeds([kind], run, history or {})
    for step, metrics in parts:
        feeds.write(step, metrics)
    feeds.close()


def read_jsonl(path, monkeypatch):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(row.pop("wall_time") - time.time()) < 600 for row in rows)
    tags = {"greedy_reward": "evaluation/", "loss": "loss/", "seconds_sync": "time/"}
    return [(tags.get(name, "") + name, row["step"], row[name]) for row in rows for name in row if name != "step"]


def read_tensorboard(path, monkeypatch):
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


def wandb_records(data):
    """The records of a `.wandb` file, which is a LevelDB log: blocks of 32 KiB hold a checksum, a
    length, a kind (1 whole, 2 first, 3 middle, 4 last) and bytes.
    """
    place, parts = 7, []
    while len(data) - place > 7:
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def read_wandb(path, monkeypatch):
    """W&B's own process may still be writing the file when `finish` returns."""
    ends = time.monotonic() + 30
    while not (rows := wandb_rows(path)) and time.monotonic() < ends:
        time.sleep(0.1)
    return rows


def wandb_rows(path):
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    rows = []
    for file in sorted(path.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file.read_bytes()):
            history = record.FromString(data).history
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item}
            rows += [(name, items["step"], value) for name, value in items.items() if "/" in name]
    return rows


def read_mlflow(path, monkeypatch):
    client = importlib.import_module("mlflow").MlflowClient()
    experiment = client.get_experiment_by_name("project")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "name"
    assert run.data.params["dtype"] == "float32"
    values = (client.get_metric_history(run.info.run_id, name) for name in run.data.metrics)
    return [(value.key, value.step, value.value) for history in values for value in history]


def read_trackio(path, monkeypatch):
    rows = importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("project", "name-000000")
    return [(name, row["step"], row[name]) for row in rows for name in row if "/" in name]


READ = {
    "jsonl": read_jsonl,
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Nothing that a sink writes leaves the test's folder or the machine."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(deadlines, "SINK_CLOSE_S", 60.0)


def needs_package(name):
    """TensorBoard and W&B are installed for the tests; the others are tried where they are."""
    if name in ("mlflow", "trackio"):
        pytest.importorskip(name)


def test_every_sink_is_read_back_here_and_named_in_the_setting():
    assert set(READ) == set(named_sinks())
    description = MegatronConfig.model_fields["sinks"].description or ""
    assert all(name in description for name in named_sinks())


@pytest.mark.parametrize("name", sorted(READ))
def test_a_sink_holds_every_value_once(name, tmp_path, offline, monkeypatch, caplog):
    needs_package(name)
    written(named_sinks()[name], sink_run(tmp_path))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(READ[name](tmp_path, monkeypatch)) == RECORDED


@pytest.mark.parametrize("name", ["jsonl", "tensorboard", "mlflow"])
def test_a_sink_that_is_chosen_later_gets_the_history(name, tmp_path, offline, monkeypatch):
    needs_package(name)
    written(named_sinks()[name], sink_run(tmp_path), PARTS[2:], {0: PARTS[0][1], 1: PARTS[1][1]})
    assert sorted(READ[name](tmp_path, monkeypatch)) == RECORDED


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_resumed_sink_goes_on(name, tmp_path, offline, monkeypatch):
    needs_package(name)
    written(named_sinks()[name], sink_run(tmp_path), PARTS[:2])
    written(named_sinks()[name], sink_run(tmp_path), PARTS[2:], {0: PARTS[0][1], 1: PARTS[1][1]})
    assert sorted(READ[name](tmp_path, monkeypatch)) == RECORDED


def test_jsonl_survives_a_kill_in_the_middle_of_a_line(tmp_path, monkeypatch):
    sink = named_sinks()[ALWAYS]
    written(sink, sink_run(tmp_path), PARTS[:2])
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-3])
    history = {0: PARTS[0][1], 1: PARTS[1][1] | PARTS[2][1]}
    written(sink, sink_run(tmp_path), [(2, {"loss": 0.25})], history)
    values = {(name, step): value for name, step, value in read_jsonl(tmp_path, monkeypatch)}
    assert values == {(name, step): value for name, step, value in [*RECORDED, ("loss/loss", 2, 0.25)]}


def broken(name, path, monkeypatch):
    """A place where the sink can't write: a file for a folder, or an address where nobody listens."""
    match name:
        case "jsonl":
            (path / "metrics.jsonl").mkdir()
        case "tensorboard":
            (path / "tensorboard").write_text("")
        case "mlflow":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        case "trackio":
            monkeypatch.setenv("TRACKIO_SPACE_ID", "nobody/nothing")  # HF_HUB_OFFLINE is set
    return sink_run(path, key="no/id" if name == "wandb" else "0" * 32)


@pytest.mark.parametrize("name", sorted(READ))
def test_a_sink_that_fails_warns_once(name, tmp_path, offline, monkeypatch, caplog):
    needs_package(name)
    feeds = Feeds([named_sinks()[name]], broken(name, tmp_path, monkeypatch), {})
    for step in range(3):
        feeds.write(step, {"loss": float(step)})
    feeds.close()
    [warning] = [record for record in caplog.records if record.name == "lockstep.metrics.feed"]
    assert warning.levelno == logging.WARNING
    assert f"metrics no longer go to {name}: " in warning.getMessage()


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path, "project", "name")
    yield store
    store.close()


def recorded(store, sinks):
    store.claim({"base_model": "tiny"})
    store.send_metrics_to(sinks, {})
    store.publish(0, store.stage(0), {"loss": 0.5})
    store.record(0, {"loss": 0.5, "greedy_reward": 1.0})
    store.close()


def test_a_run_goes_on_without_the_sinks_that_fail(store, caplog):
    (store.path / "tensorboard").write_text("")
    recorded(store, ["tensorboard"])
    assert store.metrics() == {0: {"loss": 0.5, "greedy_reward": 1.0}}
    rows = [json.loads(line) for line in (store.path / "metrics.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in row if name != "wall_time"} for row in rows] == [
        {"step": 0, "loss": 0.5},
        {"step": 0, "greedy_reward": 1.0},
    ]
    assert len(caplog.records) == 1


class Stuck:
    """A user's sink that never returns from its first write."""

    last_step = None
    release = threading.Event()

    def __init__(self, run):
        self.run = run

    def write(self, step, metrics, wall_time):
        self.release.wait(60)

    def close(self):
        raise AssertionError("nobody asks a sink that is given up")


def test_a_sink_that_hangs_delays_nothing(store, monkeypatch, caplog):
    monkeypatch.setattr(deadlines, "SINK_CLOSE_S", 0.3)
    started = time.monotonic()
    recorded(store, [f"{__name__}:Stuck"])
    assert time.monotonic() - started < 30  # the write alone would take 60
    Stuck.release.set()
    assert store.metrics() == {0: {"loss": 0.5, "greedy_reward": 1.0}}
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        f"metrics no longer go to {__name__}:Stuck: it did not end within 0.3 s"
    ]


def test_a_sink_that_falls_behind_is_given_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lockstep.metrics.feed._WAITING", 5)
    monkeypatch.setattr(deadlines, "SINK_CLOSE_S", 0.3)
    gate = threading.Event()

    def slow(run):
        gate.wait(60)
        return Stuck(run)

    feeds = Feeds([SinkKind("slow", slow)], sink_run(tmp_path), {})
    for step in range(20):
        feeds.write(step, {"loss": float(step)})
    feeds.close()
    gate.set()
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "metrics no longer go to slow: it is 5 parts of steps behind"
    ]


def run_key(store):
    return read_identity(store.path)["key"]


def test_a_run_keeps_its_key_and_another_has_its_own(store, tmp_path):
    store.claim({"base_model": "tiny"})
    key = run_key(store)
    store.close()
    again = RunStore(tmp_path, "project", "name")
    again.claim({"base_model": "tiny"})
    other = RunStore(tmp_path, "project", "other")
    other.claim({"base_model": "tiny"})
    assert (run_key(again), len(key)) == (key, 32)
    assert run_key(other) != key
    again.close()
    other.close()


NOT_HERE = SinkKind("absent", Stuck, package="no_such_package_at_all")
NO_SINK = 3


@pytest.mark.parametrize(
    ("sinks", "says"),
    [
        (["tensorbord"], "'tensorbord' must be one of mlflow, tensorboard, trackio, wandb, or your own"),
        (["jsonl"], "jsonl is always there"),
        (["tensorboard", "tensorboard"], "tensorboard is there twice"),
        (["no_module:sink"], "'no_module:sink' can't be imported"),
        ([f"{__name__}:NO_SINK"], "is a int: expected a SinkKind"),
        ([f"{__name__}:NOT_HERE"], "absent needs the package no_such_package_at_all: pip install"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_starts(sinks, says):
    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.backends.tinker.backend import TinkerBackend

    for backend in (MegatronBackend, TinkerBackend):
        with pytest.raises(ConfigError, match=r"^sinks: ") as error:
            backend(sinks=sinks)
        assert says in str(error.value)


def test_wandb_without_a_key_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="wandb: there is no key: run `wandb login`"):
        find_sinks(["wandb"])


def test_mlflow_without_a_server_is_refused(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    problem = named_sinks()["mlflow"].problem()
    assert problem is not None
    assert "MLFLOW_TRACKING_URI" in problem
