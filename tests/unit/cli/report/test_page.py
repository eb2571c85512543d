"""The page of a run: what it holds, what it hides, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from typer.testing import CliRunner

from lockstep.cli.main import app
from lockstep.cli.report.page import build_page
from lockstep.cli.report.token_text import TokenText
from lockstep.errors import StoreError
from lockstep.rollouts.trajectory import RolloutFailure, Trajectory, TrajectoryGroup
from lockstep.runs.database import RunDatabase
from random_batches import choice
from runs import healthy_metrics, make_run

LAYERS, TOP_K = 3, 2
KEY = "sk-" + "proj9" * 6
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _encoded(experts_SLK: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, experts_SLK)
    return base64.b64encode(file.getvalue()).decode()


def _group(random: np.random.Generator, version: str, size: int = 3) -> TrajectoryGroup:
    trajectories = []
    for number in range(size):
        prompt, sampled = (
            random.integers(40, 200, 6).tolist(),
            random.integers(40, 200, int(random.integers(2, 6))).tolist(),
        )
        experts_SLK = random.integers(0, 8, (len(prompt) + len(sampled) - 1, LAYERS, TOP_K)).astype(np.uint8)
        reply = choice(
            prompt,
            sampled,
            version=version,
            logprobs=(-random.exponential(size=len(sampled))).tolist(),
            routed_experts=_encoded(experts_SLK),
        )
        asked = {"role": "user", "content": f"</script><script>alert(1)</script> my key is {KEY}"}
        trajectories.append(
            Trajectory(messages_and_choices=[asked, reply], reward=float(number), metadata={"password": "swordfish99"})
        )
    return TrajectoryGroup(trajectories=trajectories)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_qwen3):
    random = np.random.default_rng()
    groups = {step: [_group(random, f"m@{step - 1}") for _ in range(2)] for step in (1, 2)}
    failure = RolloutFailure(type="KeyError", message=f"no {KEY}", where="task.py:8 in rollout")
    groups[2][1].exceptions.append(failure)
    metrics = healthy_metrics(8, random)
    for values in metrics.values():
        values["seconds_rollout"] = 99.0
    run = make_run(tmp_path_factory.mktemp("runs"), str(tiny_qwen3), metrics, groups, random)
    for step in metrics:  # SQLite keeps NaN as NULL, and JSON has neither
        RunDatabase(run.path).record(step, {"mismatch": float("nan")})
    return run


@pytest.fixture(scope="module")
def page(made):
    return build_page(made.path)


def part(pattern: str, page: str) -> str:
    match = re.search(pattern, page, re.DOTALL)
    assert match
    return match[match.lastindex or 0]


def data(page: str) -> dict:
    return json.loads(part(r'<script id="data" type="application/json">(.*?)</script>', page))


def chunk(page: str, number: int) -> list:
    packed = part(rf'<script id="chunk-{number}" type="text/plain">(.*?)</script>', page)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def test_a_token_has_both_logprobs_its_version_its_advantage_and_its_experts(made, page, tiny_qwen3):
    said = data(page)
    rows = [dict(zip(said["columns"], row, strict=True)) for row in said["index"]]
    assert len(rows) == 12
    assert [row["step"] for row in rows] == [2] * 6 + [1] * 6  # the newest first
    for row in rows:
        trajectory = made.groups[row["step"]][row["group"]].trajectories[row["trajectory"]]
        (sampled,) = trajectory.choices
        shown = chunk(page, row["chunk"])[row["place"]]["items"][1]
        assert shown["ids"] == sampled.token_ids
        assert "".join(shown["text"]) == "".join(TokenText(str(tiny_qwen3)).pieces(sampled.token_ids))
        assert shown["server"] == pytest.approx(sampled.sampled_logprobs, rel=1e-4)
        difference = np.array(shown["trainer"]) - np.array(shown["server"])
        assert 0 < np.abs(difference).max() < 0.1  # the noise that the run's trainer has
        assert shown["versions"] == [[f"m@{row['step'] - 1}", 0, len(sampled.token_ids)]]
        assert shown["advantage"] == pytest.approx((trajectory.reward - 1) / np.std([0, 1, 2]), abs=1e-4)
        layout = shown["experts"]["shape"]
        expected_SLK = np.load(io.BytesIO(base64.b64decode(sampled.routed_experts)))[6:]
        assert layout == list(expected_SLK.shape) == [len(sampled.token_ids) - 1, LAYERS, TOP_K]
        np.testing.assert_array_equal(
            np.frombuffer(base64.b64decode(shown["experts"]["data"]), "<u2").reshape(layout), expected_SLK
        )


def test_it_holds_no_secret_and_runs_nothing_of_a_prompt(page):
    texts = page + json.dumps([chunk(page, number) for number in range(len(re.findall('id="chunk-', page)))])
    assert KEY not in texts
    assert "swordfish99" not in texts
    assert "alert(1)" in texts  # shown
    assert "<script>alert" not in page  # and not run
    assert "•" * 8 in texts


def test_it_needs_no_network(page):
    assert not re.search(r"""(?:src|href)\s*=\s*["']|url\(|@import""", page)
    assert "default-src 'none'" in page


def test_figures_advice_and_failures(page):
    said = data(page)
    assert said["steps"] == list(range(1, 9))
    assert said["metrics"]["mismatch"] == [None] * 8
    assert all(published > 1e9 for published in said["published"])
    assert [given["illness"] for given in said["advice"]] == ["idle-trainer"]
    (failure,) = said["failures"]
    assert failure["where"] == "task.py:8 in rollout"


def test_the_command_writes_it_into_the_run(made):
    result = CliRunner().invoke(app, ["report", str(made.path)])
    assert result.exit_code == 0, result.output
    assert "waits 99.0 s for rollouts" in result.output
    assert (made.path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(made.path.glob(".report*"))


def test_a_damaged_file_is_named_and_the_rest_is_shown(made, tmp_path):
    copy = tmp_path / "demo" / "run"
    shutil.copytree(made.path, copy)
    (copy / "trajectories" / "train" / "0002.parquet").write_bytes(b"not parquet")
    said = data(build_page(copy))
    assert len(said["index"]) == 6
    assert "0002.parquet" in said["damaged"][0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is not a run"):
        build_page(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(made, page, tmp_path):
    """The program of the page runs to its end: curves, advice, rows, and a transcript after a click."""
    click = "document.querySelector('.row').click(); setTimeout(() => document.querySelector('.token').click(), 300);"
    file = tmp_path / "page.html"
    file.write_text(
        page.replace("</body>", f"<script>setTimeout(() => {{ {click} }}, 200)</script></body>"), encoding="utf-8"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert dom.count("<figure>") == 7  # of the metrics that this run has
    assert 'data-illness="idle-trainer"' in dom
    assert dom.count('class="row') >= 6
    tip = part(r'<div id="tip".*?</div>', dom)
    for shown in ("server's logprob", "trainer's logprob", "m@1", "advantage", "layer 0: experts"):
        assert shown in tip
