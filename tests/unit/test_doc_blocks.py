"""The Python blocks of the documents that need no server, run as they are written. tests/server/test_doc_loops.py has the others."""

from __future__ import annotations

import ast
import re
import sys
import types
from pathlib import Path

import numpy as np

import fake_tinker
import lockstep as ls
from judge_service import Server, attempt, by_length
from lockstep.algorithms.advantages import find_advantage
from lockstep.algorithms.advantages.base import Rewards
from lockstep.loop.environments.jsonl import task
from lockstep.loop.run_file import TaskSection
from lockstep.metrics.feed import Feeds
from lockstep.metrics.sinks import find_sinks
from lockstep.metrics.sinks.base import SinkRun
from lockstep.models.tiny.write import write_tiny

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN_HERE = {"docs/how-to/how-do-i.md", "docs/how-to/add-a-model.md", "docs/how-to/judge.md", "docs/how-to/metrics.md"}
RUN_HERE |= {"docs/how-to/environments.md", "docs/algorithms.md", "docs/tinker.md"}
WITH_A_SERVER = {"README.md", "docs/architecture.md", "docs/concepts/episodes.md"}


def block(page: str) -> str:
    (text,) = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return text


async def run(page: str, **given: object) -> dict:
    """Awaits at the top level are allowed, as in a notebook."""
    names = {"ls": ls, "Path": Path} | given
    code = compile(block(page), page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if code.co_flags & 0x80:  # a coroutine
        await result
    return names


def test_every_block_is_run_somewhere():
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md"), ROOT / "llms.txt"]
    having = {str(page.relative_to(ROOT)) for page in pages if BLOCK.search(page.read_text(encoding="utf-8"))}
    assert having == RUN_HERE | WITH_A_SERVER


async def test_a_models_parameters(capsys):
    await run("docs/how-to/add-a-model.md")
    assert "model.layers.1.mlp.down_proj.weight (64, 96)" in capsys.readouterr().out


async def test_an_estimator_of_ones_own(monkeypatch):
    names = await run("docs/algorithms.md")
    monkeypatch.setitem(sys.modules, "my_module", types.SimpleNamespace(ranks=names["ranks"]))
    rewards = Rewards(np.array([0.3, 0.9, 0.1]), np.zeros(3, dtype=np.int64))
    assert find_advantage("my_module:ranks").function(rewards).tolist() == [0.0, 1.0, -1.0]


async def test_a_sink_of_ones_own(tmp_path, monkeypatch, capsys):
    names = await run("docs/how-to/metrics.md")
    monkeypatch.setitem(sys.modules, "my_sinks", types.SimpleNamespace(Printed=names["Printed"]))
    feeds = Feeds(find_sinks(["my_sinks:Printed"]), SinkRun(tmp_path, "demo", "run", "key", {}), {})
    feeds.write(3, {"loss": 0.5})
    feeds.close()
    assert capsys.readouterr().out == "run 3 {'loss': 0.5}\n"


def test_a_scoring_function(tmp_path):
    (tmp_path / "scoring.py").write_text(block("docs/how-to/environments.md"))
    (tmp_path / "questions.jsonl").write_text('{"prompt": "1 + 1?", "answer": "2"}\n')
    section = TaskSection(environment="jsonl:questions.jsonl", steps=1, options={"score": "scoring.py:score"})
    assert len(task("questions.jsonl", section, tmp_path).scenarios) == 1


async def test_a_judge(tmp_path, monkeypatch):
    async def answered(text: str) -> ls.Trajectory:
        return attempt(text)

    monkeypatch.chdir(tmp_path)
    attempts = [[answered("an apple"), answered("a very long pear")]]
    names = await run("docs/how-to/judge.md", AsyncOpenAI=lambda: Server(by_length).client, attempts=attempts)
    first, second = (trajectory.reward for trajectory in names["groups"][0].trajectories)
    assert second > first
    assert (tmp_path / "judgements").exists()


async def test_the_tinker_backend(tmp_path, monkeypatch):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    service = fake_tinker.Service(write_tiny("qwen3", tmp_path / "small", seed=5, overrides=sizes))
    monkeypatch.setitem(sys.modules, "tinker", service.module())
    monkeypatch.setenv("TINKER_API_KEY", "tml-x")
    monkeypatch.chdir(tmp_path)
    model = ls.TrainableModel(name="m", project="p", base_model="Qwen/Qwen3-8B")
    names = await run("docs/tinker.md", model=model)
    assert model.step == 0
    await names["backend"].close()
