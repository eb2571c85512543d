"""Every family at every parallel size, in two processes and a few in four: the same figures as against Hugging Face in one process.

One launch runs all checks of a group; each check is a test of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases import tiny
from helpers import ENGINE, python_path
from lockstep.testing.programs import torchrun
from random_models import draw_seed, exact, random_fields, within

SIZES: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2, "sequence": False},
    "tp2-sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "cp2": {"context": 2},
}
EXPERT_SIZES: dict[str, dict[str, Any]] = {
    "ep2": {"expert": 2, "data": 2},
    "tp2-ep2": {"tensor": 2, "sequence": False, "expert": 2},
    "tp2-sp-ep2": {"tensor": 2, "sequence": True, "expert": 2},
    "tp2-sp-etp2": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "cp2-ep2": {"context": 2, "expert": 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "tp2-sp-ep2-etp2-dp2": {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2, "data": 2},
    "pp2-dp2-ep2": {"pipeline": 2, "data": 2, "expert": 2},
    "pp4": {"pipeline": 4},
    "tp2-sp-cp2-ep2": {"tensor": 2, "sequence": True, "context": 2, "expert": 2},
    "pp2-cp2": {"pipeline": 2, "context": 2},
}
FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe")


def sizes_of(family: str) -> dict[str, dict[str, Any]]:
    return SIZES | EXPERT_SIZES if "moe" in family else SIZES


CASES = [(f, s, kind) for f in FAMILIES for s in sizes_of(f) for kind in ("check", "lora")]
CASES += [("qwen3_5_moe", s, "exact") for s in sizes_of("qwen3_5_moe")] + [("qwen3", "tp2-sp", "exact")]
"""Exact: the family with every kind of layer, and plain attention."""
FAST = {("qwen3_5", s, "lora") for s in SIZES} | {("qwen3_moe", s, "lora") for s in EXPERT_SIZES}
FAST |= {case for case in CASES if case[2] == "exact"}
FAST |= {("qwen3", s, "check") for s in ("dp2", "cp2")} | {("qwen3_5_moe", "tp2-sp-ep2", "check")}
"""Every family, and every kind of layer at every size: in fp64, or with adapters; an update with data, context, tensor and expert
parallelism. The slow tier has the rest in fp32."""
SLOW = {*CASES} - FAST
ROUTED = [("qwen3_moe", s) for s in EXPERT_SIZES] + [("qwen3_5_moe", s) for s in sizes_of("qwen3_5_moe")]
SLOW_ROUTED = {("qwen3_5_moe", s) for s in EXPERT_SIZES}
"""What the attention layers beside a mixture are does not matter to its experts: one family has them fast."""


RESUMED = [
    ("qwen3_moe", "tp2-sp-ep2", True),
    ("qwen3_5_moe", "tp2-sp-etp2", True),
    ("qwen3_5_moe", "tp2-sp-ep2", False),
    ("qwen3_5", "pp2", False),
    ("qwen3", "tp2", True),
    ("qwen3_5_moe", "cp2-ep2", True),
]


STEPPED = [("qwen3_moe", "tp2-sp"), ("qwen3_moe", "cp2-ep2"), ("qwen3_5", "cp2")]


NARROW = [(f, s, kind) for f in ("qwen3", "qwen3_5") for s in ("tp2", "tp2-sp") for kind in ("check", "lora")]
NARROW += [("qwen3", "cp2", "check")]
"""One key head for two ranks that share heads."""
SLOW_NARROW = {("qwen3", "tp2", "lora"), ("qwen3", "tp2-sp", "check")}
SLOW_NARROW |= {("qwen3_5", "tp2", "check"), ("qwen3_5", "tp2-sp", "lora")}


def launch(folder: Path, checks: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    """Run the checks in that many processes; their figures by name."""
    asked, answered = folder / "checks.json", folder / "measured.json"
    asked.write_text(json.dumps(checks))
    command = torchrun(processes, str(ENGINE / "parity.py"), str(asked), str(answered))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(answered.read_text())


def models(folder: Path, families: tuple[str, ...], seed: int, **fixed: Any) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    made = {}
    for family in families:
        fields = random_fields(family, rng) | {"num_hidden_layers": 4} | fixed
        made[family] = str(tiny(family, folder / family, seed=seed, dtype="float32", **fields))
    return made


def slow(case: tuple[str, ...], slow_ones: Container[tuple[str, ...]]) -> Any:
    """The case as a parameter of its tier."""
    return pytest.param(*case, marks=pytest.mark.slow) if case in slow_ones else case


def checks_of(cases: Iterable[tuple[str, str, str]], made: dict[str, str], seed: int) -> list[dict[str, Any]]:
    return [
        {"name": f"{f}/{s}/{kind}", "kind": kind, "folder": made[f], "parallel": sizes_of(f)[s], "seed": seed}
        for f, s, kind in cases
    ]


def routed_checks(cases: Iterable[tuple[str, str]], made: dict[str, str], seed: int) -> list[dict[str, Any]]:
    return checks_of(((f, s, "replay") for f, s in cases), made, seed)


def narrow_checks(cases: Iterable[tuple[str, str, str]], folder: Path, seed: int) -> list[dict[str, Any]]:
    made = {
        family: str(tiny(family, folder / f"narrow-{family}", seed=seed, dtype="float32", num_key_value_heads=1))
        for family in ("qwen3", "qwen3_5")
    }
    return [check | {"name": f"narrow/{check['name']}"} for check in checks_of(cases, made, seed)]


@pytest.fixture(scope="module")
def two_slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, seed = tmp_path_factory.mktemp("two-slow"), draw_seed()
    made = models(folder, FAMILIES, seed)
    checks = checks_of(sorted(SLOW), made, seed) + routed_checks(sorted(SLOW_ROUTED), made, seed)
    checks += narrow_checks(sorted(SLOW_NARROW), folder, seed)
    return {"seed": seed, **launch(folder, checks, 2)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, seed = tmp_path_factory.mktemp("two"), draw_seed()
    made = models(folder, FAMILIES, seed)
    checks = checks_of((case for case in CASES if case not in SLOW), made, seed)
    checks += routed_checks((case for case in ROUTED if case not in SLOW_ROUTED), made, seed)
    checks += [
        {
            "name": f"resume/{f}/{s}/{lora}", "kind": "resume", "folder": made[f], "parallel": sizes_of(f)[s], "seed": seed,
            "lora": lora, "place": str(folder / f"resume-{f}-{s}-{lora}"),
        }
        for f, s, lora in RESUMED
    ]  # fmt: skip
    checks += checks_of(((f, s, "step") for f, s in STEPPED), made, seed)
    checks += narrow_checks((case for case in NARROW if case not in SLOW_NARROW), folder, seed)
    odd = {"folder": made["qwen3_moe"], "seed": seed, "spread": 1}
    checks += [{"name": f"odd/{s}", "parallel": sizes_of("qwen3_moe")[s], **odd} for s in ("dp2", "ep2")]
    checks += [
        {
            "name": "uneven",
            "folder": made["qwen3_5"],
            "parallel": {"pipeline": 2},
            "seed": seed,
            "stages": [1, 3],
            "recompute": True,
        }
    ]
    return {"seed": seed, **launch(folder, checks, 2)}


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "size", "kind"), [slow(case, SLOW) for case in CASES])
def test_two_processes(request: pytest.FixtureRequest, family: str, size: str, kind: str) -> None:
    launched = request.getfixturevalue("two_slow" if (family, size, kind) in SLOW else "two")
    measured = launched[f"{family}/{size}/{kind}"]
    assert (exact if kind == "exact" else within)(measured), (launched["seed"], measured)


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "size"), [slow(case, SLOW_ROUTED) for case in ROUTED])
def test_replayed_experts(request: pytest.FixtureRequest, family: str, size: str) -> None:
    """Experts that no router would choose give the same logprobs at every size, and others than the live router's."""
    two = request.getfixturevalue("two_slow" if (family, size) in SLOW_ROUTED else "two")
    measured = two[f"{family}/{size}/replay"]
    assert measured["difference"] < 1e-4, (two["seed"], measured)
    assert measured["effect"] > 1e-3, (two["seed"], measured)
    assert measured["same_top"] > 0.99, (two["seed"], measured)
    assert measured["differ"] > 0.5, (two["seed"], measured)  # random routed experts, hardly ever the router's own
    assert measured["recomputed"] == measured["differ"], (two["seed"], measured)
    caught = [name for name in measured if name.startswith("caught_")]
    assert {"caught_layer", "caught_token", "caught_twice", "caught_beyond"} <= {*caught}
    for once in ("same_choices", "counted_once", *caught):
        assert measured[once] == 1.0, (once, two["seed"], measured)


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "size"), STEPPED)
def test_whole_steps(two: dict[str, Any], family: str, size: str) -> None:
    """Loss, KL, ratios, gradient norm and all other metrics of two updates are those of data-parallel ranks."""
    measured = two[f"{family}/{size}/step"]
    assert measured["metric"] < 5e-3, (two["seed"], measured)
    assert measured["metrics"] > 20


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "size", "lora"), RESUMED)
def test_state_does_not_depend_on_sizes(two: dict[str, Any], family: str, size: str, lora: bool) -> None:
    measured = two[f"resume/{family}/{size}/{lora}"]
    assert measured["same_bytes"] == 1.0, (two["seed"], measured)
    assert measured["same_norm"] == 1.0, (two["seed"], measured)
    assert measured["norm"] < 1e-4, (two["seed"], measured)
    assert measured["files"] >= 3


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "size", "kind"), [slow(case, SLOW_NARROW) for case in NARROW])
def test_fewer_key_heads_than_ranks(request: pytest.FixtureRequest, family: str, size: str, kind: str) -> None:
    two = request.getfixturevalue("two_slow" if (family, size, kind) in SLOW_NARROW else "two")
    measured = two[f"narrow/{family}/{size}/{kind}"]
    assert within(measured), (two["seed"], measured)


@pytest.mark.distributed
@pytest.mark.parametrize("size", ["dp2", "ep2"])
def test_one_row_fewer_on_one_rank(two: dict[str, Any], size: str) -> None:
    assert within(two[f"odd/{size}"]), (two["seed"], two[f"odd/{size}"])


@pytest.mark.distributed
def test_uneven_stages_with_recompute(two: dict[str, Any]) -> None:
    assert within(two["uneven"]), (two["seed"], two["uneven"])


@pytest.mark.distributed
@pytest.mark.parametrize("kinds", [("check", "lora"), pytest.param(("lora", "check"), marks=pytest.mark.slow)])
def test_four_processes(tmp_path: Path, kinds: tuple[str, str]) -> None:
    """All weights and adapters in turn; the slow tier has the other half."""
    seed = draw_seed()
    heads = {"num_attention_heads": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8}  # for tensor x context
    made = models(tmp_path, ("qwen3_5_moe",), seed, **heads)
    checks = [
        {"name": s, "kind": kinds[number % 2], "folder": made["qwen3_5_moe"], "parallel": parallel, "seed": seed}
        for number, (s, parallel) in enumerate(FOUR.items())
    ]
    for name, measured in launch(tmp_path, checks, 4).items():
        assert within(measured), (seed, name, measured)
