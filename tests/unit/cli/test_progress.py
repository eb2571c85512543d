"""A command that waits says so, in a terminal and where its output is piped."""

from __future__ import annotations

import io

from rich.console import Console

from lockstep.cli.tables import progress as module
from lockstep.cli.tables.progress import progress


def test_newcomer_c2_piped_output_says_what_is_under_way(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    said = io.StringIO()
    with progress(Console(file=said), "starting [trainer]") as say:
        for second in range(25):
            now[0] = float(second)
            say(f"starting vLLM, {second} s")
    assert said.getvalue().splitlines() == ["starting [trainer]", "starting vLLM, 10 s", "starting vLLM, 20 s"]


def test_newcomer_c2_a_terminal_keeps_one_line():
    shown = io.StringIO()
    with progress(Console(file=shown, force_terminal=True, width=60), "starting [trainer]") as say:
        say("starting vLLM, 2 s")
    assert "starting vLLM, 2 s" in shown.getvalue()
