"""A request's routes leave the engine once, complete, and are those of its tokens: vLLM's scheduler with random traffic, prefixes that
are shared, copied blocks, preemptions, clients that leave.

The servers themselves, with models whose routers are Hugging Face's: `test_replay.py`, `test_replay_hybrid.py`, `test_preempted.py`.
"""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from lockstep.families.tiny import write_tiny
from probing import probed

pytestmark = pytest.mark.server
HERE = Path(__file__).parent


def hash_of(tokens):
    digest = zlib.crc32(np.array(tokens, np.int32).tobytes())
    return [digest & 255, digest >> 8 & 255]


def check(request):
    """Its rows came with its last token, or with each where stop strings are looked for elsewhere, and are its own."""
    tokens, given = request["tokens"], request["given"]
    came = [rows for _, rows in given]
    if request["stop"]:
        assert None not in came
    else:
        assert came[:-1] == [None] * (len(came) - 1)
    if request["aborted"]:
        assert request["stop"] or came[-1:] in ([], [None])
        return
    rows = [row for part in came if part for row in part]
    assert len(rows) == len(tokens) - 1
    assert [hashes for hashes, _ in rows] == [hash_of(tokens[:end]) for end in range(1, len(tokens))]
    # What was sampled was sampled with the experts of the first time, also where it was computed again since.
    steps = [low + 256 * high for _, (low, high) in rows]
    assert steps[request["prompt"] :] == request["first"][request["prompt"] :]


@pytest.mark.parametrize(
    ("shape", "kind", "steps"), [("qwen3_moe", "plain", 1), ("qwen3_moe", "plain", 2), ("qwen3_5_moe", "hybrid", 2)]
)
def test_the_rows_of_its_tokens_once(runtime, tmp_path, shape, kind, steps):
    seed = random.randrange(1 << 30)
    env = {"PYTHONPATH": str(runtime.plugin_path), "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
    model = str(write_tiny(shape, tmp_path / "model"))
    arguments = model, str(seed), kind, str(steps)
    [found] = probed(runtime, HERE / "route_probe.py", *arguments, env=env, log=tmp_path / "log")
    assert found["preempted"] > 0, seed
    assert bool(found["copies"]) == (kind == "hybrid"), seed
    for request in found["requests"]:
        check(request)
    assert sum(not request["aborted"] for request in found["requests"]) > 30


def test_vllm_hands_over_token_by_token(runtime, tmp_path):
    env = {"PYTHONPATH": str(runtime.plugin_path), "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
    [came] = probed(runtime, HERE / "vllm_routes_probe.py", env=env, log=tmp_path / "log")
    # When this fails, vLLM keeps the rows back by itself: see whether lockstep_vllm/route_capture.py is still needed.
    assert came == [True, True, True]
