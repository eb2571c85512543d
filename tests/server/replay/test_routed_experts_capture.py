"""A request's routed experts leave the engine once, complete, and are those of its tokens: vLLM's
scheduler with random traffic, prefixes that are shared, copied blocks, preemptions, clients that
leave.

The servers themselves, with models whose routers are Hugging Face's: `test_replay.py`, `test_replay_hybrid.py`, `test_preempted.py`.
"""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest

from helpers import SERVER
from lockstep.models.tiny.write import write_tiny
from lockstep.testing.programs import probed

pytestmark = pytest.mark.server
CASES = [("qwen3_moe", "plain", 1), ("qwen3_moe", "plain", 2), ("qwen3_5_moe", "hybrid", 2)]
"""The model whose configuration is used, the groups of its cache, steps that are under way at a time."""


def hash_of(tokens):
    digest = zlib.crc32(np.array(tokens, np.int32).tobytes())
    return [digest & 255, digest >> 8 & 255]


def check(request):
    """Its rows came with its last token, or with each where stop strings are looked for elsewhere, and are its own."""
    tokens, came = request["tokens"], request["given"]
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


@pytest.fixture(scope="module")
def captured(runtime, tmp_path_factory):
    """[what vLLM does, then of each of CASES], and the seed of it all."""
    scratch, seed = tmp_path_factory.mktemp("routed_experts"), random.randrange(1 << 30)
    models = {shape: write_tiny(shape, scratch / shape) for shape in ("qwen3_moe", "qwen3_5_moe")}
    cases = [f"{models[shape]},{kind},{steps}" for shape, kind, steps in CASES]
    env = {"PYTHONPATH": str(runtime.plugin_path), "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
    [results] = probed(runtime, SERVER / "routed_experts_probe.py", str(seed), *cases, env=env, log=scratch / "log")
    return results, seed


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{kind}-{steps}" for _, kind, steps in CASES])
def test_the_rows_of_its_tokens_once(captured, number):
    results, seed = captured
    result, kind = results[1 + number], CASES[number][1]
    assert result["preempted"] > 0, seed
    assert bool(result["copies"]) == (kind == "hybrid"), seed
    for request in result["requests"]:
        check(request)
    assert sum(not request["aborted"] for request in result["requests"]) > 30


def test_vllm_hands_over_token_by_token(captured):
    # When this fails, vLLM keeps the rows back by itself: see whether lockstep_vllm/routed_experts/capture.py is still needed.
    assert captured[0][0] == [True, True, True]
