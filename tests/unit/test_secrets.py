"""Secrets and foreign data in the source: how tokens are compared and shown, and that nothing is unpickled."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lockstep.engine.weight_sync.control import Endpoint
from lockstep.inference.client import Server
from lockstep.trainer.protocol import SyncAdapter, SyncWeights

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("runtime/**/*.py")])
SECRET = re.compile(r"api_key|secret|password|bearer|authorization|_expected$", re.IGNORECASE)
UNPICKLES = re.compile(
    r"\bimport (pickle|cPickle|dill|cloudpickle|marshal|shelve)\b|\bfrom (pickle|dill|cloudpickle) import"
    r"|\btorch\.load\(|\bjoblib\.load|allow_pickle=True|\btrust_remote_code\s*=\s*True|\beval\(|\bexec\("
    r"|\b\w+_object(_list)?\(|yaml\.load\("
)


def test_nothing_unpickles():
    offending = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if UNPICKLES.search(line) and ".eval()" not in line
    ]
    assert len(SOURCES) > 250
    assert offending == []


@pytest.mark.parametrize(
    "line", ["torch.load(path)", "import pickle", "dist.all_gather_object(all, one)", "np.load(f, allow_pickle=True)"]
)
def test_what_unpickles_is_found(line):
    assert UNPICKLES.search(line)


def plain_comparisons(source: str) -> list[str]:
    """`==` or `!=` between two values of which one is named as a secret; a constant on one side is a question about absence."""
    offending = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare) or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
            continue
        sides = [node.left, *node.comparators]
        names = [side.attr if isinstance(side, ast.Attribute) else getattr(side, "id", "") for side in sides]
        if any(SECRET.search(name) for name in names) and not any(isinstance(side, ast.Constant) for side in sides):
            offending.append(ast.unparse(node))
    return offending


def test_secrets_are_compared_in_constant_time():
    offending = [
        f"{path.relative_to(ROOT)}: {text}" for path in SOURCES for text in plain_comparisons(path.read_text())
    ]
    assert [line for line in offending if "next_token" not in line] == []
    assert plain_comparisons("if given == self.api_key: pass") == ["given == self.api_key"]


def test_no_secret_is_in_a_repr_or_an_error(tmp_path):
    secret = "s3cret-" + "x" * 30
    shown = [
        Endpoint("http://127.0.0.1:1", secret),
        SyncWeights("http://127.0.0.1:1", "m@1", "gloo", 1.0, secret),
        SyncAdapter("http://127.0.0.1:1", "m@1", "gloo", 1.0, secret),
        Server(None, 1, secret, "m"),  # pyright: ignore[reportArgumentType]
    ]
    for thing in shown:
        assert secret not in repr(thing)
        assert secret not in f"{thing}"


async def test_no_secret_is_in_the_error_of_a_server_that_is_gone(tmp_path):
    import sys

    from lockstep.errors import ServerError
    from lockstep.process.child import child_env, spawn

    secret = "s3cret-" + "x" * 30
    child = spawn([sys.executable, "-c", "pass"], child_env(), tmp_path / "log", "the server")
    child.wait(20)
    with pytest.raises(ServerError) as refused:
        await Server(child, 1, secret, "m").models()
    assert secret not in f"{refused.value!r} {refused.value.__cause__!r} {refused.value.__context__!r}"
