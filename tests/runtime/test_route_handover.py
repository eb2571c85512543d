"""A request's routes leave the engine once, and are what vLLM alone would have sent token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from probing import probed


@pytest.mark.server
def test_the_same_rows_at_the_end(runtime, tmp_path):
    env = {"PYTHONPATH": str(runtime.plugin_path), "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
    [(vllms, ours)] = probed(runtime, Path(__file__).with_name("route_probe.py"), env=env, log=tmp_path / "log")
    for given in vllms[0]:
        # When this fails, vLLM keeps the rows back by itself: drop lockstep_vllm/route_handover.py.
        assert all(rows is not None for rows in given)
    for given, (kept_back, left) in zip(vllms[0], ours[0], strict=True):
        assert kept_back[:-1] == [None] * (len(given) - 1)
        [dtype] = {dtype for dtype, _ in given}
        assert kept_back[-1] == [dtype, [row for _, rows in given for row in rows]]
        assert left == 0
    with_stop_strings = [given for given, _ in ours[1]]
    assert with_stop_strings == vllms[1]
    for kept_back, left in ours[2]:  # its client left
        assert set(kept_back) == {None}
        assert left == 0
