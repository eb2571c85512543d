"""A server on a CPU may be silent for as long as its model's largest step takes there."""

from __future__ import annotations

import pytest

from lockstep.backends.megatron.launch import longest_step_s
from lockstep.config import deadlines
from lockstep.inference.watch import _Watch
from lockstep.process.patience import Patience


def test_the_longest_step_follows_from_the_weights(tmp_path, tiny_qwen3):
    assert longest_step_s(tiny_qwen3) < 1.0  # the floor of HUNG_S is what counts
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(270_000_000)  # SmolLM2 in bf16, without its bytes
    assert longest_step_s(tmp_path) == pytest.approx(2 * 135e6 * 2048 / 1e10)


class Server:
    def __init__(self):
        self.hung = None
        self.ended = False
        self.child = self

    def kill(self):
        self.ended = True


@pytest.mark.parametrize(("floor_s", "ends_after"), [(deadlines.HUNG_S, 8), (55.0, 55), (200.0, 200)])
def test_a_long_step_of_a_large_model_is_no_hang(floor_s, ends_after):
    """Short steps were seen before; the next is silent for longer."""
    server = Server()
    watch = _Watch(server, Patience(floor_s))
    watch._note({"answered": True, "work": "requests"}, 0.2)
    for _ in range(ends_after):
        watch._note({"answered": False, "work": "requests"}, 1.0)
    assert not server.ended
    watch._note({"answered": False, "work": "requests"}, 1.0)
    assert server.ended
