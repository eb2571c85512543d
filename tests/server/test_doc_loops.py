"""The loops of README.md and docs/architecture.md with the rollout of docs/concepts/episodes.md, on a tiny model and a real server."""

from __future__ import annotations

import ast
import asyncio
import os
import random
import re
import sys
from pathlib import Path

import pytest

import lockstep as ls
from lockstep.models.tiny.write import write_tiny

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
AGENT = f"""#!{sys.executable}
import sys
import openai
reply = openai.OpenAI().chat.completions.create(
    model="any", messages=[{{"role": "user", "content": sys.argv[1]}}], max_tokens=2
)
assert reply.choices[0].message is not None
"""


def block(page: str) -> str:
    (text,) = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return text


async def run(source: str, names: dict) -> None:
    await eval(compile(source, "a document", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
async def test_a_loop_trains(runtime, tmp_path, monkeypatch, page):
    """Changed for a machine without GPUs: the model's name, its placement, and two steps instead of twenty."""
    base = write_tiny("qwen3", tmp_path / "base", seed=1)
    source = block(page).replace("Qwen/Qwen3-8B", str(base)).replace("model.step < 20", "model.step < 2")
    source, placed = re.subn(r",? *placement=ls\.Placement\(trainer=\[0\], inference=\[1\]\),?", ",", source)
    source = source.replace('path="./runs",,', 'path="./runs",').replace(",)", ")").replace("    ,", "    ")
    assert placed == 1
    monkeypatch.chdir(tmp_path)
    Path("agent").write_text(AGENT)
    Path("agent").chmod(0o755)
    drawn = random.Random(0)
    names: dict = {"asyncio": asyncio, "os": os, "score": lambda scenario: drawn.random(), "tasks": ["one?", "two?"]}
    exec(block("docs/concepts/episodes.md"), names)
    await run(source, names)
    assert names["result"].step == names["model"].step == (2 if page == "README.md" else 1)
    assert Path("runs/demo/yes-no-maybe/steps/0001").is_dir()
    assert isinstance(names["model"], ls.TrainableModel)
