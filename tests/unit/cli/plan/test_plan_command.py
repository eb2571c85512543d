"""The plan against every training step and sync that `benchmarks/results/` has: memory within 15%, time within 25%."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lockstep.cli.plan.ceilings import ADAPTER_SYNC_S, DEVICES, SYNC_S
from lockstep.cli.plan.command import show_plan
from lockstep.cli.plan.layouts import Asked, _sync_s, layouts
from lockstep.cli.plan.work import Model, Ranks, Step, memory, seconds
from lockstep.errors import ConfigError
from lockstep.models.config import parse_config
from lockstep.models.registry import get_model_support_spec
from lockstep.models.tiny.write import tiny_config

ROOT = Path(__file__).parents[4]
RESULTS = ROOT / "benchmarks" / "results"
H200 = DEVICES["h200"]
ROOM = H200.memory - (2 << 30)
TIME, MEMORY = 0.25, 0.15


def results(name: str):
    return json.loads((RESULTS / name).read_text())


@pytest.fixture(scope="module")
def shapes():
    """Fields of released models' configs, by the names that the benchmarks use."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from shapes import SHAPES
    finally:
        sys.path.pop(0)
    return SHAPES


def model_of(fields: dict, folder: Path, rank: int) -> Model:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    spec = get_model_support_spec(str(folder))
    return Model.of(parse_config(fields, spec, source="config.json"), spec, rank)


def released(shapes, name: str, folder: Path, rank: int, **overrides) -> Model:
    import transformers

    kind, fields = shapes[name]
    raw = getattr(transformers, kind)(**fields | overrides).to_dict()
    return model_of(raw | {"architectures": [kind.replace("Config", "ForCausalLM")]}, folder / name, rank)


@pytest.fixture(scope="module")
def qwen3_8b(shapes, tmp_path_factory):
    return released(shapes, "qwen3-8b", tmp_path_factory.mktemp("configs"), 16)


def context_of(case: dict, name: str, packed: bool) -> float:
    """Tokens that a token of the case attends to, on average."""
    length, shared = case["length"], round(case["share"] * case["length"])
    if not packed or case["kind"] == "tree":
        return length / 2
    own, count = length - shared, case["samples"]
    return (shared**2 / 2 + count * own * (shared + own / 2)) / (shared + count * own)


def test_steps_of_qwen3_8b(qwen3_8b):
    """Fifteen steps of one row or many, with and without shared prefixes and recomputed layers."""
    measured = results("h200_packing_qwen3_8b.json")
    cases, checked = measured["cases"], 0
    for contender, figures in measured["found"]["qwen3-8b"].items():
        for case, (name, seen) in zip(cases, figures.items(), strict=True):
            rows, tokens = int(seen["rows"]), int(seen["tokens"])
            step = Step(tokens, tokens // rows, rows, context_of(case, name, contender == "packed"))
            planned = memory(qwen3_8b, step, Ranks(), ROOM)
            assert planned.peak == pytest.approx(seen["peak_bytes"], rel=MEMORY), (contender, name)
            assert planned.recomputed == pytest.approx(seen["layers_recomputed"], abs=1), (contender, name)
            took = seconds(qwen3_8b, step, Ranks(), int(seen["layers_recomputed"]), H200)
            assert took == pytest.approx(seen["seconds"], rel=TIME), (contender, name)
            checked += 1
    assert checked == 15


def test_memory_of_small_models_on_one_and_two_ranks(tmp_path):
    """All families; tensor, sequence, expert and context parallel. Their time is not known, and the plan says so."""
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    try:
        from ranks import COMMON, SHAPES
    finally:
        sys.path.pop(0)
    for name, seen in results("h200_parity_bf16.json").items():
        family, sizes, last = name.partition("/")[0], seen["parallel"], seen["steps"][-1]
        model = model_of(tiny_config(family, COMMON | SHAPES[family]).to_dict(), tmp_path / family, 16)
        tensor = sizes.get("tensor", 1)
        ranks = Ranks(tensor, expert=sizes.get("expert", 1), sequence=sizes.get("sequence", tensor > 1))
        row = 2048 // sizes.get("context", 1)
        assert last["padding_share"] == pytest.approx(1 - last["tokens"] / 2048)
        step = Step(int(last["tokens"]), row, 1, 300.0)
        assert memory(model, step, ranks, ROOM).peak == pytest.approx(last["peak_memory_bytes"], rel=MEMORY), name
        assert seconds(model, step, ranks, 0, H200) is None


def test_memory_of_a_mixture_beside_its_server(shapes, tmp_path):
    model = released(shapes, "qwen3-30b-a3b", tmp_path, 8, num_hidden_layers=6)
    for seen in results("h200_merged_steps_qwen3_30b_a3b_6_layers.json")["steps"]:
        metrics = seen["metrics"]
        step = Step(int(metrics["tokens"]), int(metrics["row_length"]), int(metrics["rows"]), 200.0)
        assert memory(model, step, Ranks(), ROOM).peak == pytest.approx(metrics["peak_memory_bytes"], rel=MEMORY)
        assert seconds(model, step, Ranks(), 0, H200) is None
        assert model.parameters * 2 == metrics["sync_bytes"]


def test_syncs(shapes, tmp_path):
    """Merged weights over NCCL, staged and streamed, and adapters from memory to an idle server."""
    for name, file in (("qwen3-8b", "qwen3_8b"), ("qwen3-30b-a3b", "qwen3_30b_a3b")):
        model = released(shapes, name, tmp_path, 16)
        asked = Asked(2, 4096, 8, True, None, H200)
        for row in results(f"h200_weight_sync_{file}_tp1_to_tp1.json")["rows"]:
            if row["what"].startswith("nccl, TP1 to TP1"):
                assert _sync_s(model, asked) == pytest.approx(row["seconds"], rel=TIME), row["what"]
        for row in results("h200_adapter_sync_qwen3_8b_qwen3_30b_a3b.json")["rows"]:
            if (row["shape"], row["way"], row["traffic"]) == (name, "memory", False):
                assert model.adapter * 2 == pytest.approx(row["gb"] * 1e9, rel=1e-3)
                assert _sync_s(model, replace(asked, merged=False)) == pytest.approx(row["seconds"], rel=TIME)


def test_layouts_share_the_gpus_out(qwen3_8b):
    asked = Asked(8, 4096, 64, False, None, H200)
    made = layouts(qwen3_8b, asked)
    assert [layout.ranks.gpus for layout in made] == [1, 2, 4]
    for layout in made:
        assert layout.ranks.gpus + layout.servers * layout.server_gpus == 8
        assert layout.memory.peak < H200.memory
        assert layout.cache_tokens >= 4096
        assert layout.sync_s > layout.servers * ADAPTER_SYNC_S
    times = [layout.step_s for layout in made]
    assert times == sorted(times, reverse=True)
    long = layouts(qwen3_8b, replace(asked, context=40960, merged=True))
    assert long[0].memory.recomputed > 20 or long[0].ranks.tensor > 1
    assert long[-1].sync_s > long[-1].servers * SYNC_S


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gpus": 1}, "at least 2"),
        ({"gpus": 16}, "give --network"),
        ({"device": "b200"}, "only h200 was measured"),
        ({"context": 50_000}, "40960 positions"),
        ({"mode": "full"}, "lora or merged"),
    ],
)
def test_what_was_never_measured_is_refused(qwen3_8b, shapes, tmp_path, options, why):
    released(shapes, "qwen3-8b", tmp_path, 16)
    asked = {
        "gpus": 8,
        "context": 4096,
        "sequences": 64,
        "mode": "lora",
        "network": None,
        "device": "h200",
        "scale": False,
    }
    with pytest.raises(ConfigError, match=why):
        show_plan(str(tmp_path / "qwen3-8b"), **asked | options, console=Console())


def test_a_table_up_to_1024_gpus(shapes, tmp_path, capsys):
    released(shapes, "qwen3-8b", tmp_path, 16)
    console = Console(width=140)
    with console.capture() as shown:
        show_plan(str(tmp_path / "qwen3-8b"), 1024, 4096, 64, "lora", 50.0, "h200", True, console)
    lines = shown.get().splitlines()
    assert [int(line.split()[0]) for line in lines[1:11]] == [2**power for power in range(1, 11)]
    assert "unknown" not in "".join(lines[:11])
    assert "49% of 788 TFLOP/s" in shown.get()
    assert "50 GB/s between hosts, as given" in shown.get()
