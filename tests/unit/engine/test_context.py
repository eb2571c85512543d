"""What context parallelism refuses, before any process has to find out. (Its numbers: test_packing, test_parallel.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cases import tiny
from lockstep.config.megatron import Parallel
from lockstep.engine.parallel.device import check_world
from lockstep.errors import ConfigError
from lockstep.models.parallel_sizes import check_heads
from lockstep.models.registry import load_model_config
from lockstep.trainer.protocol import EngineConfig, from_json

HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 6}


@pytest.mark.parametrize(
    ("family", "fields", "sizes", "refused"),
    [
        ("qwen3", HEADS, {"context": 3}, None),
        ("qwen3", HEADS, {"context": 3, "tensor": 2}, None),
        ("qwen3", HEADS, {"context": 4}, "4 does not divide num_attention_heads = 6"),
        ("qwen3", HEADS, {"context": 4, "tensor": 2}, "8 does not divide num_attention_heads = 6"),
        ("qwen3_5", HEADS | LINEAR, {"context": 2}, None),
        ("qwen3_5", HEADS | LINEAR, {"context": 3}, "3 does not divide linear_num_key_heads = 2"),
    ],
)
def test_heads_must_divide(
    family: str, fields: dict[str, Any], sizes: dict[str, int], refused: str | None, tmp_path: Path
) -> None:
    config = load_model_config(str(tiny(family, tmp_path / "model", **fields)))
    if refused is None:
        check_heads(config, Parallel(**sizes))
        return
    with pytest.raises(ConfigError, match=refused):
        check_heads(config, Parallel(**sizes))


def test_sizes_must_agree() -> None:
    settings = from_json(
        EngineConfig, {"model": "x", "parallel": {"context": 2, "data": 2, "tensor": 2}}, "engine.json"
    )
    check_world(settings.parallel, 8)
    with pytest.raises(
        ConfigError, match="tensor 2 x pipeline 1 x context 2 x data 2 need 8 processes, but 4 were started"
    ):
        check_world(settings.parallel, 4)
    with pytest.raises(ConfigError, match="expert x expert_tensor = 4 must divide tensor x data x context = 2"):
        from_json(EngineConfig, {"model": "x", "parallel": {"context": 2, "expert": 4}}, "engine.json")
