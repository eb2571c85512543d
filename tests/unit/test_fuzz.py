"""Foreign data of every kind, mutated by hypothesis: a typed error in one line, or a valid result; never anything else."""

from __future__ import annotations

import base64
import io
import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters import Model, random_adapter
from cases import tiny
from lockstep.batching.pack import load_batch, save_batch
from lockstep.batching.packed_batch import PackedBatch
from lockstep.batching.routed_experts import RoutedExpertsShape, decode_routed_experts
from lockstep.errors import ConfigError, DataError, LockstepError, WeightsError
from lockstep.gateway.app import CHAT, MESSAGES, RESPONSES, _translated
from lockstep.gateway.refusal import Refusal
from lockstep.loop.run_file import load_run_file
from lockstep.models.checkpoint.peft import read_adapter
from lockstep.runs.database import read_jobs
from lockstep.runs.store import RunStore
from lockstep.validate.reference.batches import batch_of, tree_sequences
from lockstep_wire.plan import PlanError, parse
from lockstep_wire.routed_experts import routed_experts_digest
from lockstep_wire.transports import connect

CASES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**30),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\0", "../..", "9" * 5000, "float32", "load", "-1"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner_path for key, item in inner for inner_path in places(item, (*path, key)))]


def with_value(intact: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `intact` with another value at a path."""
    if not path:
        return value
    copy = json.loads(json.dumps(intact))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return copy


def one_line(error: BaseException) -> None:
    assert 400 <= getattr(error, "status", 400) < 500
    assert isinstance(error, LockstepError | Refusal | PlanError)
    assert str(error)
    assert len(str(error)) < 3000


DAMAGE = st.tuples(
    st.sampled_from(["cut", "flip", "more", "header"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
)
"""Where, as a share of the file, and by what. Described, so that a failing case is short."""


def damaged(intact: bytes, damage: tuple[str, list[tuple[float, int]]]) -> bytes:
    """A file that was cut, flipped in a few places or in its header, or lengthened."""
    kind, flips = damage
    if kind == "cut":
        return intact[: int(flips[0][0] * len(intact))]
    if kind == "more":
        return intact + bytes(value for _, value in flips)
    content, reach = bytearray(intact), len(intact) if kind == "flip" else min(len(intact), 300)
    for place, value in flips:
        content[int(place * reach)] ^= value
    return bytes(content)


@dataclass
class Files:
    """Files that a test damages, as they were."""

    folder: Path
    intact: dict[str, bytes]

    def __repr__(self) -> str:  # in hypothesis' report of a failing case
        return str(self.folder)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Files:
    rng = np.random.default_rng(5)
    file = tmp_path_factory.mktemp("packed") / "batch.safetensors"
    save_batch(batch_of(tree_sequences(rng), rng, row_length=32), file)
    return Files(file.parent, {file.name: file.read_bytes()})


@CASES
@given(damage=DAMAGE)
def test_packed_batches(packed, damage):
    [(name, intact)] = packed.intact.items()
    file = packed.folder / name
    file.write_bytes(damaged(intact, damage))
    try:
        batch = load_batch(file)
    except DataError as error:
        one_line(error)
    else:
        assert {field.name for field in fields(PackedBatch)} <= set(vars(batch))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Model, Files]:
    folder = tmp_path_factory.mktemp("adapter")
    model = Model(tiny("qwen3", folder / "base", seed=1))
    model.write(folder / "adapter", random_adapter(model.sites, 2), model.targets)
    return model, Files(folder / "adapter", {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()})


@CASES
@given(data=st.data())
def test_adapter_folders(adapter, data):
    model, folder, files = adapter[0], adapter[1].folder, adapter[1].intact
    name = data.draw(st.sampled_from(sorted(files)))
    for other, content in files.items():
        (folder / other).write_bytes(content)
    if name.endswith(".json") and data.draw(st.booleans()):
        intact = json.loads(files[name])
        path = data.draw(st.sampled_from(places(intact)))
        (folder / name).write_text(json.dumps(with_value(intact, path, data.draw(JSON))))
    else:
        (folder / name).write_bytes(damaged(files[name], data.draw(DAMAGE)))
    try:
        tensors, info = read_adapter(folder, model.sites, model.config, model.checkpoint.layout)
    except WeightsError as error:
        one_line(error)
    else:
        assert {f"{site.module}.lora_A" for site in model.sites if site.target in info.targets} <= set(tensors)


SHAPE = RoutedExpertsShape(layers=2, top_k=2, experts=8)
PROMPT, REPLY = [5, 6, 7], [8, 9]


def payload(rows: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, rows)
    return base64.b64encode(file.getvalue()).decode()


@CASES
@given(data=st.data())
def test_routed_experts_payloads(data):
    rng = np.random.default_rng(3)
    rows = np.argsort(rng.random((4, 2, 8)), -1)[..., :2].astype(np.uint8)
    intact = base64.b64decode(payload(rows))
    torn = base64.b64encode(damaged(intact, data.draw(DAMAGE))).decode()
    sent = data.draw(st.sampled_from([torn, torn[:-1], "", "é", payload(rows.astype(float)), payload(rows[:1])]))
    bound = intact if data.draw(st.booleans()) else base64.b64decode(torn)  # a digest that fits, too
    try:
        decoded = decode_routed_experts(sent, routed_experts_digest(PROMPT, REPLY, bound), PROMPT, REPLY, SHAPE, "it")
    except DataError as error:
        one_line(error)
    else:
        assert decoded.shape[1:] == (SHAPE.layers, SHAPE.top_k)
        assert decoded.max() < SHAPE.experts


RUN_FILE = """
[model]
name = "a"
project = "b"
base_model = "c"
lora = { rank = 8, alpha = 16 }

[task]
file = "task.py"
steps = 3

[backend]
path = "runs"

[train]
learning_rate = 1e-2
"""


@CASES
@given(data=st.data())
def test_run_files(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    lines = RUN_FILE.splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    key = lines[number].partition("=")[0] or "x"
    values = ("nan", "-1", "[]", "9" * 400, '"xxxxxxxxx"', "{}", "1979-05-27")
    lines[number] = data.draw(st.sampled_from([f"{key}= {text}" for text in values]) | st.text(max_size=30))
    if data.draw(st.booleans()):
        file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(damaged(RUN_FILE.encode(), data.draw(DAMAGE)))
    try:
        load_run_file(file)
    except ConfigError as error:
        one_line(error)


CHATS = {
    "chat": (
        CHAT,
        {
            "model": "m",
            "messages": [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "y"}]},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
    ),
    "responses": (
        RESPONSES,
        {
            "model": "m",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "y"},
            ],
            "instructions": "z",
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
        },
    ),
    "messages": (
        MESSAGES,
        {
            "model": "m",
            "max_tokens": 5,
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "y"}]},
            ],
            "tools": [{"name": "f", "input_schema": {}}],
        },
    ),
}


@pytest.mark.parametrize("dialect", CHATS)
@CASES
@given(data=st.data())
def test_chat_requests(dialect, data):
    translate, intact = CHATS[dialect]
    path = data.draw(st.sampled_from([path for path in places(intact) if path]))
    try:
        asked = _translated(translate, with_value(intact, path, data.draw(JSON)))
    except Refusal as refusal:
        one_line(refusal)
    else:
        assert isinstance(asked, dict)


PLAN = {
    "id": "x" * 64,
    "senders": [
        [{"nbytes": 32, "slots": [["a", "float32", [2, 4], 0, None]]}],
        [
            {"nbytes": 16, "slots": [["b", "float32", [2, 4], 0, [[0, 1], [0, 4]]]]},
            {"nbytes": 16, "slots": [["b", "float32", [2, 4], 0, [[1, 2], [0, 4]]]]},
        ],
    ],
}


@settings(CASES, max_examples=300)
@given(data=st.data())
def test_weight_update_plans(data):
    path = data.draw(st.sampled_from(places(PLAN)))
    try:
        plan = parse(with_value(PLAN, path, data.draw(JSON | st.integers(-5, 40))))
    except PlanError as error:
        one_line(error)
        return
    for bucket in plan.buckets:
        bytes_N = torch.zeros(bucket.nbytes, dtype=torch.uint8)
        for slot in bucket.slots:
            assert slot.view(bytes_N).shape == slot.shape


SENDERS = [
    {"transport": name, "folder": "/nowhere", "world_size": 2, "deadline_s": 0.2} for name in ("gloo", "disk", "ipc")
]


@CASES
@given(data=st.data())
def test_weight_update_connections(data):
    intact = data.draw(st.sampled_from(SENDERS))
    path = data.draw(st.sampled_from([path for path in places(intact) if path]))
    info = with_value(intact, path, data.draw(JSON))
    with pytest.raises((ValueError, RuntimeError)):
        connect(info, 1, torch.device("cpu"))


@pytest.fixture
def recorded(tmp_path) -> Path:
    store = RunStore(tmp_path, "project", "name")
    store.claim({"base_model": "a"})
    store.jobs.submit(1, "lora_step", "digest")
    store.close()
    return store.path


@CASES
@given(
    column=st.sampled_from(["id", "step", "kind", "attempt", "state", "schema", "created", "error", "phase"]),
    value=SCALARS,
)
def test_job_records(recorded, column, value):
    with closing(sqlite3.connect(recorded / "run.sqlite")) as database, database:
        try:
            database.execute(f"UPDATE jobs SET {column} = ?", (value,))
        except (sqlite3.Error, OverflowError, UnicodeError):
            return  # the table's own checks
    try:
        [job] = read_jobs(recorded)
        assert getattr(job, column) == value or value != value or isinstance(value, bool | int | float | str)
        store = RunStore(recorded.parents[1], "project", "name")
    except LockstepError as error:
        one_line(error)
    else:
        assert [job.state for job in store.jobs.listed()] == ["failed"]
        store.close()
    with closing(sqlite3.connect(recorded / "run.sqlite")) as database, database:
        database.execute("DELETE FROM jobs")
        database.execute(
            "INSERT INTO jobs (id, schema, step, kind, attempt, digest, state, created)"
            " VALUES ('1', 1, 1, 'lora_step', 1, 'd', 'queued', 0)"
        )
