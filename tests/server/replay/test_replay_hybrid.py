"""Expert replay for Qwen3.5's mixture of experts on real parts, in bf16: GatedDeltaNet layers, a prefix cache of large blocks.

In bf16 two programs pick other experts at near ties, so routed experts have no one right answer: they are held against what Hugging Face
computes in fp32 by their share, against the server's own rows exactly, and by what replaying them does to the log-probabilities.

Shape suffixes: S tokens, L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import lockstep as ls
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.batching.prepare import prepare
from lockstep.errors import DataError
from lockstep.models.tiny.write import write_tiny
from replaying import (
    FAULTS,
    SHAPE,
    group,
    multi_turn,
    plant,
    prompt_tokens,
    roll_out,
    routed_experts_of,
    served_in_every_way,
    words,
)

pytestmark = [pytest.mark.server, pytest.mark.slow]  # Triton's interpreter: minutes
CONFIG = ls.TrainConfig(learning_rate=1e-2)
BLOCK = 1152
"""Tokens of a cache block of the tiny model: attention's and the states' pages are of one size."""


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "hybrid"
    return write_tiny("qwen3_5_moe", folder, seed=random.randrange(1000))


@pytest.fixture(scope="module")
async def running(runtime, base_model, tmp_path_factory):
    """(model, backend) at step 1, so that the adapter changes something."""
    backend = MegatronBackend(path=tmp_path_factory.mktemp("runs"), max_model_len=2048)
    model = ls.TrainableModel(
        name="hybrid", project="tests", base_model=str(base_model), lora=ls.LoraConfig(rank=8, alpha=32)
    )
    await model.register(backend)
    await backend.train(model, [group(await roll_out(model, [words(20)], n=4))], CONFIG)
    yield model, backend
    await backend.close()


def choices_of_hugging_face(base_model, ids_S):
    """[S, L, K] experts of the base model in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.tensor([ids_S]), output_router_logits=True)
    return torch.stack([layer.topk(SHAPE.top_k).indices for layer in out.router_logits], 1).numpy()


def share_in_common(one_SLK, other_SLK) -> float:
    return float((one_SLK[..., :, None] == other_SLK[..., None, :]).any(-1).mean())


def check_packed(trajectories, batch) -> None:
    """Every row that the server sent lies on its token in what the trainer gets; where turns repeat a token, the first one's."""
    assert len(batch.leaf_Q) == len(trajectories)
    for number, trajectory in enumerate(trajectories):
        row, path = int(batch.row_Q[number]), batch.path_index(number)
        known = np.zeros(len(path), bool)
        for choice in trajectory.choices:
            rows_SLK = routed_experts_of(choice)
            ids = choice.prompt_token_ids + choice.token_ids
            assert batch.tokens_RS[row, path[: len(ids)]].tolist() == ids
            assert len(rows_SLK) == len(ids) - 1
            new = np.flatnonzero(~known[: len(rows_SLK)])
            np.testing.assert_array_equal(batch.experts_RSLK[row, path[new]], rows_SLK[new])
            known[new] = True
        assert known.tolist() == [True] * (len(path) - 1) + [False]


async def check_replay(model, backend, base_model, served) -> None:
    """The server's rows are near Hugging Face's, on their tokens in the packed batch, and with them the trainer is near the server."""
    for way in ("n = 4", "multi-turn"):
        choice = served[way][0].choices[-1]
        rows_SLK = routed_experts_of(choice)
        expected_SLK = choices_of_hugging_face(base_model, choice.prompt_token_ids + choice.token_ids)
        assert share_in_common(rows_SLK, expected_SLK[: len(rows_SLK)]) > 0.7, way  # the adapter, too, moves some
        assert share_in_common(rows_SLK[1:], expected_SLK[: len(rows_SLK) - 1]) < 0.5, way  # and not off by one
    everything = [trajectory for part in served.values() for trajectory in part]
    groups = [group(everything)]
    batch = prepare(groups, model_name="hybrid", step=model.step, config=CONFIG, routed_experts=SHAPE).batch
    check_packed(everything, batch)
    result = await backend.train(model, groups, CONFIG)
    assert result.metrics["turns_split"] == 0.0
    assert result.metrics["mismatch_kl"] < 1e-3
    assert result.metrics["expert_choices_differ"] < 0.1


async def test_replayed_experts_are_the_servers(running, base_model):
    model, backend = running
    served = {"n = 4": await roll_out(model, [words(40)], n=4), "multi-turn": [await multi_turn(model)]}
    await check_replay(model, backend, base_model, served)


async def test_long_prompts_cached_and_in_chunks(running, base_model):
    model, backend = running
    served = await served_in_every_way(model, backend.run_info(model).server, BLOCK, long=1400, chunked=(4, 700))
    assert prompt_tokens(served["chunked prefill"]) > 2048
    cold, again = (routed_experts_of(served[way][0].choices[0]) for way in ("cold", "prefix-cache hit"))
    np.testing.assert_array_equal(again[:BLOCK], cold[:BLOCK])  # the very record that the cached tokens were made with
    await check_replay(model, backend, base_model, served)


@pytest.mark.parametrize(("fault", "says"), FAULTS.items())
async def test_planted_faults_are_refused_by_name_and_change_nothing(running, fault, says):
    model, backend = running
    trajectories = await roll_out(model, [words(20)], n=3)
    plant(fault, trajectories[1].choices[0])
    step = model.step
    with pytest.raises(DataError, match=f"group 0, trajectory 1, choice 0.*{says}"):
        await backend.train(model, [group(trajectories)], CONFIG)
    assert model.step == step
