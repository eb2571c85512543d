"""Every family against Hugging Face in one process: logits, loss, all gradients, one update; and the same through adapters.

Shapes are drawn afresh on every run; the seed in a failure's message brings them back.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import parity
from cases import tiny
from random_models import draw_seed, exact, random_fields, within

FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "llama3")


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_hugging_face(family: str, tmp_path: Path) -> None:
    from lockstep.models.tiny.write import tiny_models

    if family not in tiny_models():
        pytest.skip(f"no tiny {family}")
    seed = draw_seed()
    fields = random_fields(family, np.random.default_rng(seed))
    folder = tiny(family, tmp_path / "model", seed=seed, dtype="float32", **fields)
    for recompute in (False, True):
        measured = parity.check(folder, {}, seed, recompute=recompute)
        assert within(measured), (seed, fields, measured)
    measured = parity.check_lora(folder, {}, seed)
    assert within(measured), (seed, fields, measured)
    measured = parity.check_exact(folder, {}, seed)
    assert exact(measured), (seed, fields, measured)


@pytest.mark.usefixtures("groups")
def test_one_target_alone_and_unknown_target(tmp_path: Path) -> None:
    from lockstep.config.megatron import Parallel
    from lockstep.engine.state import open_trainer
    from lockstep.errors import ConfigError
    from lockstep.trainer.protocol import EngineConfig, LoraSettings

    folder = tiny("qwen3", tmp_path / "model", dtype="float32")
    for target in ("k_proj", "up_proj", "down_proj"):
        assert within(parity.check_lora(folder, {}, 7, [target]))
    with pytest.raises(ConfigError, match="nose"):
        open_trainer(EngineConfig(str(folder), Parallel(), lora=LoraSettings(8, 8.0, ("q_proj", "nose"))))
