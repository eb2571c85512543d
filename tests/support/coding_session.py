"""The requests of a coding harness that speaks Anthropic's Messages: ten turns of tools, streams, a compaction and two sub-agents.

The harness's side is recorded. The model's side is whatever is sampled. The harness gives replies back without their thinking,
with other white space, and with sorted arguments.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())
Blocks = list[dict[str, Any]]


def requests(max_tokens: int) -> Generator[tuple[str, dict[str, Any], bool], Blocks, None]:
    """Yields (agent, body, stream) of each request, and is sent the content of its reply."""
    histories: dict[str, list[dict[str, Any]]] = {name: [] for name in RECORDED["agents"]}
    for step in RECORDED["steps"]:
        agent, history = RECORDED["agents"][step["agent"]], histories[step["agent"]]
        if "compact" in step:
            history.clear()
        history.append({"role": "user", "content": _content(step, history)})
        body = {**agent, "messages": list(history), "max_tokens": max_tokens}
        blocks = yield step["agent"], body, step.get("stream", False)
        history.append(
            {"role": "assistant", "content": [_drifted(block) for block in blocks if block["type"] != "thinking"]}
        )


def _content(step: dict[str, Any], history: list[dict[str, Any]]) -> Any:
    if "result" not in step:
        return step.get("say") or step["compact"]
    calls = [block["id"] for block in history[-1]["content"] if block["type"] == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": call, "content": step["result"]} for call in calls]
    return results or step["result"]


def _drifted(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] == "text":
        return {"type": "text", "text": f"{block['text'].strip()}\n"}
    kept = {name: block[name] for name in ("type", "id", "name", "input")}
    return kept | {"input": dict(sorted(block["input"].items()))}
