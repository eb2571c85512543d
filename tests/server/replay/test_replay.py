"""Expert replay on real parts: the experts vLLM used, choice by choice, are the ones Megatron-Core trains on.

One server and one trainer for the whole file, on a Qwen3 mixture of experts in fp32, where routed experts have one right answer.
Shape suffixes: S tokens, L mixture-of-experts layers, E experts, K experts per token.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
from functools import partial

import numpy as np
import pytest
import torch

import lockstep as ls
from lockstep.backends.megatron.backend import MegatronBackend
from lockstep.errors import DataError, MismatchError
from lockstep.models.tiny.write import write_tiny
from replaying import (
    FAULTS,
    SHAPE,
    group,
    plant,
    prompt_tokens,
    roll_out,
    routed_experts_of,
    served_in_every_way,
    with_routed_experts,
    words,
)

pytestmark = pytest.mark.server
CONFIG = ls.TrainConfig(learning_rate=1e-2)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return write_tiny("qwen3_moe", tmp_path_factory.mktemp("base") / "moe", seed=random.randrange(1000))


@pytest.fixture(scope="module")
async def running(runtime, base_model, tmp_path_factory):
    """(model, backend) at step 1, so that the adapter changes something."""
    # Colocated: the verification then has to wake the server for its routed experts, and the trainer again to replay them.
    together = ls.Placement(trainer="cpu", inference="cpu")
    backend = MegatronBackend(path=tmp_path_factory.mktemp("runs"), max_model_len=1024, placement=together)
    model = ls.TrainableModel(
        name="moe", project="tests", base_model=str(base_model), lora=ls.LoraConfig(rank=8, alpha=32)
    )
    await model.register(backend)
    await backend.train(model, [group(await roll_out(model, [words(20)], n=4))], CONFIG)
    yield model, backend
    await backend.close()


NEAR = 1e-4
"""Router logits that are nearer than this may come in either order in fp32: ten times what two programs differ by."""
MOST_TIES = 4
"""Of some 35,000 choices; a fault shows in hundreds, and by more than NEAR."""


class Reference:
    """PEFT on the Hugging Face model in fp32, made to go on with the server's experts.

    Without that, one choice between equal experts would change all later log-probabilities.
    """

    def __init__(self, base_model, adapter):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
        self.model, self.ties = PeftModel.from_pretrained(model, adapter).eval(), 0
        self._rows_SLK, self._way = np.zeros(0), ""
        for number, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(partial(self._replay, number))

    def logprobs(self, ids_S, rows_SLK, temperature, way):
        """[S - 1] log-probability of each token after the first. Fails where the server's experts are not the router's."""
        self._rows_SLK, self._way = rows_SLK, way
        ids = torch.tensor([ids_S])
        with torch.no_grad():
            logprobs = (self.model(ids).logits / temperature).log_softmax(-1)[0, :-1]
        return logprobs.gather(-1, ids[0, 1:, None])[:, 0].numpy()

    def _replay(self, layer, gate, _inputs, routed):
        logits_SE, scores_SK, chosen_SK = routed
        theirs_SK = torch.from_numpy(self._rows_SLK[:, layer].astype(np.int64))
        count = len(theirs_SK)  # the last token's experts are not sent
        own_SK, served_SK = logits_SE[:count].gather(1, chosen_SK[:count]), logits_SE[:count].gather(1, theirs_SK)
        differs_SK = chosen_SK[:count] != theirs_SK
        apart = float((own_SK - served_SK).abs()[differs_SK].max()) if differs_SK.any() else 0.0
        assert apart < NEAR, f"{self._way}, layer {layer}: the server chose an expert whose logit is {apart} away"
        self.ties += int(differs_SK.any(1).sum())
        chosen_SK = torch.cat([theirs_SK, chosen_SK[count:]])
        weights_SK = logits_SE.softmax(-1).gather(1, chosen_SK)
        weights_SK = weights_SK / weights_SK.sum(-1, keepdim=True) if gate.norm_topk_prob else weights_SK
        return logits_SE, weights_SK.to(scores_SK.dtype), chosen_SK


async def test_replayed_experts_are_the_servers(running, base_model):
    """Every row that the server sends is what Hugging Face's router picks, and with them the trainer's log-probabilities are
    the server's.
    """
    model, backend = running
    served = await served_in_every_way(model, backend.run_info(model).server)
    adapter = backend.run_path(model) / "steps" / f"{model.step:04d}" / "adapter"
    reference = Reference(base_model, adapter)
    for way, trajectories in served.items():
        for trajectory in trajectories:
            for choice in trajectory.choices:
                rows_SLK = routed_experts_of(choice)
                ids = choice.prompt_token_ids + choice.token_ids
                assert len(rows_SLK) == len(ids) - 1
                sampled = choice.sampled_logprobs
                logprobs = reference.logprobs(ids, rows_SLK, choice.sampling["temperature"], way)
                np.testing.assert_allclose(sampled, logprobs[-len(sampled) :], atol=1e-5)
    assert reference.ties <= MOST_TIES
    assert prompt_tokens(served["chunked prefill"]) > 3 * 2048
    everything = [rollout for part in served.values() for rollout in part]
    result = await backend.train(model, [group(everything)], CONFIG)
    assert result.metrics["mismatch_max"] < 1e-5
    picks = result.metrics["tokens_computed"] * SHAPE.layers * SHAPE.top_k
    assert result.metrics["expert_choices_differ"] * picks <= 2 * MOST_TIES + 0.5
    assert result.metrics["routed_experts_differ_between_turns"] == 0.0
    assert result.metrics["turns_split"] == 0.0


@pytest.mark.parametrize(("fault", "says"), FAULTS.items())
async def test_planted_faults_are_refused_by_name_and_change_nothing(running, fault, says):
    model, backend = running
    trajectories = await roll_out(model, [words(20)], n=3)
    plant(fault, trajectories[1].choices[0])
    step = model.step
    with pytest.raises(DataError, match=f"group 0, trajectory 1, choice 0.*{says}") as caught:
        await backend.train(model, [group(trajectories)], CONFIG)
    assert "\n" not in str(caught.value)
    assert model.step == step


async def test_other_experts_are_replayed_counted_and_felt(running):
    """A wrong pick that no check can see is replayed as given: it shows in `expert_choices_differ`, exactly, and in the log-probabilities.

    In the last layer, where no later router depends on it.
    """
    model, backend = running
    trajectories = await roll_out(model, [words(20)], n=2)
    (choice,) = trajectories[0].choices
    rows = routed_experts_of(choice)
    changed = len(choice.token_ids) - 1  # pyright: ignore[reportAttributeAccessIssue]
    for token in range(len(rows) - changed, len(rows)):
        rows[token, -1, 0] = next(e for e in range(SHAPE.experts) if e not in rows[token, -1])
    with_routed_experts(choice, rows)
    result = await backend.train(model, [group(trajectories)], CONFIG.model_copy(update={"max_mismatch": None}))
    computed = result.metrics["tokens_computed"] - len(trajectories)  # nothing follows the last ones
    expected = changed / (computed * SHAPE.layers * SHAPE.top_k)
    assert result.metrics["expert_choices_differ"] == pytest.approx(expected)
    assert result.metrics["mismatch_max"] > 1e-3
    refusing = CONFIG.model_copy(update={"max_mismatch": 1e-4, "max_steps_off_policy": 1})
    kept = await backend.train(model, [group(trajectories)], refusing)  # sampled by the step before: they don't count
    assert "mismatch" not in kept.metrics
    fresh = await roll_out(model, [words(20)], n=2)
    with_routed_experts(fresh[0].choices[0], np.roll(routed_experts_of(fresh[0].choices[0]), 1, axis=0))
    with pytest.raises(MismatchError, match="max_mismatch"):
        await backend.train(model, [group(fresh)], refusing)


async def test_scores_may_be_asked_for_beside_rollouts(running):
    """Without `--lora-target-modules`, vLLM on a CPU dies of prompt logprobs that share a batch."""
    model, backend = running
    server, name = backend.run_info(model).server, model.inference_name()
    ids = [random.randrange(3, 300) for _ in range(50)]
    alone = await server.score(name, ids)
    rollouts = asyncio.ensure_future(roll_out(model, [words(20)], n=4))
    together = await asyncio.gather(*(server.score(name, ids) for _ in range(4)))
    assert len(await rollouts) == 4
    for scores in together:
        np.testing.assert_allclose(scores, alone, atol=1e-5)


@pytest.mark.slow
async def test_replay_can_be_turned_off(running, base_model):
    """Last, since it closes the shared server: no routed experts come, none are wanted, and in fp32 the router picks the same."""
    model, backend = running
    captured = await roll_out(model, [words(20)], n=2)
    await backend.close()
    off = MegatronBackend(path=backend.path, max_model_len=1024, enable_expert_replay=False)
    again = ls.TrainableModel(name="moe", project="tests", base_model=str(base_model), lora=model.lora)
    await again.register(off)
    try:
        assert again.step == model.step
        trajectories = await roll_out(again, [words(20)], n=2)
        assert (trajectories[0].choices[0].model_extra or {}).get("routed_experts") is None
        result = await off.train(again, [group(trajectories + captured)], CONFIG)
        assert result.metrics["mismatch_max"] < 1e-5
        assert "expert_choices_differ" not in result.metrics
    finally:
        await off.close()


def test_vllm_still_needs_the_interpreter(runtime):
    """What `lockstep_vllm/interpreter` is for. When this fails, vLLM returns routed experts on a CPU by itself: drop the folder."""
    code = "from vllm.triton_utils import HAS_TRITON; print(HAS_TRITON)"
    for interpreter in (False, True):
        path = str(runtime.plugin_path)
        if interpreter:
            path += f":{runtime.plugin_path / 'lockstep_vllm' / 'interpreter'}"
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "TRITON_INTERPRET": "1", "VLLM_PLUGINS": ""}
        done = subprocess.run(
            [str(runtime.python), "-c", code],
            env=environment | {"VLLM_NO_USAGE_STATS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip().splitlines()[-1] == str(interpreter)
