"""`lockstep validate` with a server, end to end on a dense model."""

from __future__ import annotations

import random

import pytest

from lockstep.models.tiny.write import write_tiny
from lockstep.validate.request import Request
from lockstep.validate.stages.server import train_inf_mismatch as stage


def test_prompts_are_different_texts():
    assert len({stage.prompt(number) for number in range(32)}) == 32


@pytest.mark.server
@pytest.mark.parametrize("damage", [False, True], ids=["sound", "the server holds other weights"])
async def test_a_dense_model(runtime, tmp_path, damage, monkeypatch):
    """fp32: trainer and server agree on every token, for base and adapter. Planted fault: the server reads another checkpoint."""
    small = {"num_hidden_layers": 2, "hidden_size": 64}
    base = write_tiny("qwen3", tmp_path / "model", seed=random.randrange(1000), overrides=small)
    if damage:
        other = write_tiny("qwen3", tmp_path / "other", seed=1001, overrides=small)
        honest = stage.launch

        async def launch(config, *rest):
            return await honest(config.model_copy(update={"model": other}), *rest)

        monkeypatch.setattr(stage, "launch", launch)
    outcome = await stage.run(Request(base, tmp_path / "stage", "qwen3", seed=3, prompts=5, tokens=12))
    assert outcome.status == ("failed" if damage else "passed"), outcome.reason
    assert ("don't train this model here" in outcome.reason) == damage
    figures = {figure.name: figure for figure in outcome.figures}
    for policy in ("base", "adapter"):
        trained, again = (figures[f"{policy}, {way}: |difference|"] for way in ("trainer", "server again"))
        assert trained.ok == (not damage)
        assert figures[f"{policy}, trainer: KL"].ok == (not damage)
        assert (figures[f"{policy}, trainer: most likely 1 that differ"].value == 0) == (not damage)
        assert (again.limit, again.largest < 1e-5) == (None, True)
        assert len(outcome.plots["logprob scatter"][policy]) == 5 * 12
    assert not any("expert" in name for name in figures)
