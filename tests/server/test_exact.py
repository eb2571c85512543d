"""numerics="exact" on real parts: on every token that vLLM samples, the trainer's log-probability is the server's to 1e-6.

A fresh random model of each family that vLLM serves in fp32, at step 1 so that the adapter changes something; prompts that are cold,
found in the prefix cache and chunked, several temperatures, siblings and turns; replayed experts.
"""

from __future__ import annotations

import random

import pytest

import lockstep as ls
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.errors import ConfigError, MismatchError
from lockstep.models.tiny.write import write_tiny
from replaying import group, multi_turn, prefix_hits, roll_out, words

pytestmark = pytest.mark.server
CONFIG = ls.TrainConfig(learning_rate=1e-2)


async def running(family, folder, **settings):
    """(model, backend) of a fresh random model at step 0."""
    base = write_tiny(family, folder / "base", seed=random.randrange(10_000))
    backend = MegatronBackend(path=folder / "runs", max_model_len=1024, **settings)
    model = ls.TrainableModel(
        name="exact",
        project="tests",
        base_model=str(base),
        lora=ls.LoraConfig(rank=8, alpha=random.choice((8, 24, 40))),
    )
    await model.register(backend)
    return model, backend


async def rollouts(model, server):
    """Trajectories of every kind."""
    long = words(500)
    trajectories = await roll_out(model, [long], tokens=24)
    before = await prefix_hits(server)
    trajectories += await roll_out(model, [long], n=3, tokens=24, temperature=0.6)
    assert await prefix_hits(server) > before
    trajectories += await roll_out(model, [words(40)], n=3, tokens=24, temperature=1.7)
    trajectories += [await multi_turn(model)]
    for _ in range(3):
        trajectories += await roll_out(model, [words(850)], tokens=4)
    return trajectories


async def check_exact(model, backend):
    for _ in range(2):  # at step 0 the adapter changes nothing
        trajectories = await rollouts(model, backend.run_info(model).server)
        result = await backend.train(model, [group(trajectories)], CONFIG)
        assert result.metrics["mismatch_max"] <= 1e-6
        assert result.metrics["tokens_scored"] > 150
        assert result.metrics.get("expert_choices_differ", 0.0) == 0.0
        assert result.metrics["probe"] < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "llama3"])
async def test_every_token_agrees(runtime, family, tmp_path):
    model, backend = await running(family, tmp_path, numerics="exact")
    try:
        await check_exact(model, backend)
        await check_one_token_off(model, backend)
    finally:
        await backend.close()


async def check_one_token_off(model, backend):
    """Planted fault: one log-probability moved by 2e-6, the error names its trajectory and its token."""
    trajectories = await roll_out(model, [words(40)], n=3, tokens=12)
    choice = trajectories[1].choices[0]
    choice.sampled_logprobs[5] -= 2e-6
    place = len(choice.prompt_token_ids) + 5
    step = model.step
    with pytest.raises(MismatchError, match=f"group 0, trajectory 1, token {place}: .*max_token_mismatch = 1e-06"):
        await backend.train(model, [group(trajectories)], CONFIG)
    assert model.step == step


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("qwen3_5", {}, "bfloat16 only on a CPU"),
        ("qwen3", {"dtype": "bfloat16"}, "the weights are bfloat16"),
        ("qwen3", {"rollout_weights_mode": "merged"}, "merging rounds"),
    ],
)
async def test_what_cannot_be_exact_is_refused_before_anything_starts(runtime, tmp_path, family, settings, why):
    with pytest.raises(ConfigError, match=f"does not support numerics = 'exact': .*{why}"):
        await running(family, tmp_path, numerics="exact", **settings)


@pytest.mark.slow
async def test_without_it_fp32_is_off_by_more(runtime, tmp_path):
    """What `lockstep_vllm.patches.exact_fp64` is for. When this fails, two fp32 programs agree to 1e-6 by themselves: drop it."""
    model, backend = await running("qwen3", tmp_path)
    try:
        trajectories = await rollouts(model, backend.run_info(model).server)
        with pytest.raises(MismatchError, match="max_token_mismatch = 1e-06"):
            await backend.train(model, [group(trajectories)], CONFIG.model_copy(update={"max_token_mismatch": 1e-6}))
    finally:
        await backend.close()
