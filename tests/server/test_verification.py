"""Identity: what the live slots and weights hold is read back after a sync. Faults planted in running servers, in bf16.

Shapes: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import asyncio
import random
import re

import pytest
import torch
from safetensors.torch import load_file

from lockstep.engine.weight_sync.buckets import describe
from lockstep.engine.weight_sync.plan import make_plan
from lockstep.engine.weight_sync.sender import AdapterPusher, Endpoint, WeightPusher
from lockstep.errors import MismatchError, ServerLostError
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.models.checkpoint.peft import AdapterInfo, adapter_config
from lockstep.models.registry import load_model_config
from lockstep.models.tiny.write import write_tiny
from lockstep.testing.faults import EXTENSION, Plot
from lockstep_wire.transports.gloo import GlooSender

pytestmark = pytest.mark.server

TOKENS = torch.randint(3, 300, (64,)).tolist()
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "experts")
RANK, ALPHA = 4, 12.0
RATES = (1e-6, 1e-5, 1e-4)


class Masters:
    """An adapter in fp32 as an optimizer holds it: B has made some steps from zero, and each step moves every element by the rate."""

    def __init__(self, config, rate: float) -> None:
        self.rate, self.generator = rate, torch.Generator().manual_seed(random.randrange(1 << 30))
        hidden, size = config.hidden_size, config.head_dim
        heads, kv = config.heads * size, config.kv_heads * size
        shapes = {"q_proj": (heads, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, heads)}
        experts = {"gate_proj": (False,), "up_proj": (False,), "down_proj": (True,)}
        self.tensors: dict[str, torch.Tensor] = {}
        for layer in range(config.layers):
            owner = f"base_model.model.model.layers.{layer}"
            for name, (out, into) in shapes.items():
                self._pair(f"{owner}.self_attn.{name}", (RANK, into), (out, RANK))
            for name, (down,) in experts.items():
                out, into = (hidden, config.expert_size) if down else (config.expert_size, hidden)
                many = config.experts
                self._pair(f"{owner}.mlp.experts.{name}", (many, RANK, into), (many, out, RANK))

    def _pair(self, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        self.tensors[f"{module}.lora_A.weight"] = (
            torch.empty(a).uniform_(-1, 1, generator=self.generator) * a[-1] ** -0.5
        )
        self.tensors[f"{module}.lora_B.weight"] = 4 * self.rate * torch.randn(b, generator=self.generator)

    def stepped(self) -> list[tuple[str, torch.Tensor]]:
        """What travels after one more step, in bf16."""
        for tensor in self.tensors.values():
            tensor += self.rate * torch.randn(tensor.shape, generator=self.generator).sign()
        return [(name, tensor.bfloat16()) for name, tensor in self.tensors.items()]


def a_changed(old, new, side: str) -> str:
    """The name of some matrix that the last step changed."""
    names = [
        name
        for (name, before), (_, other) in zip(old, new, strict=True)
        if side in name and not torch.equal(before, other)
    ]
    return random.choice(names)


@pytest.fixture(scope="module")
async def mixture(runtime, tmp_path_factory):
    """A server of adapters on a tiny mixture in bf16, its plot, and its config."""
    folder = write_tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "moe", seed=random.randrange(10_000))
    plot = Plot(runtime, tmp_path_factory.mktemp("plugin") / "copy")
    config = ServerConfig(
        model=folder,
        served_name="base",
        dtype="bfloat16",
        lora=LoraServing(max_rank=8, max_loras=2, targets=("q_proj", "k_proj", "v_proj", "o_proj", "experts")),
        max_model_len=256,
        max_num_seqs=8,
        threads=1,
        extra_args=EXTENSION,
    )
    server = await launch(config, plot.runtime, tmp_path_factory.mktemp("run"))
    yield server, plot, load_model_config(str(folder))
    await server.close()


FAULTS = {
    "adapter of the step before": "is not what was sent",
    "another model's adapter": "is not what was sent",
    "stale A": "{name}' is not what was sent",
    "stale B": "{name}' is not what was sent",
    "scaled twice": r"lora_B\.weight' is not what was sent",
    "missing expert": r"\.experts\.\w+\.lora_B\.weight' is not what was sent",
    "left in the padding": "belong to no weight of it",
    "layer switched off": "switched the wrong way",
}


# The smallest rate is the hardest to tell apart.
@pytest.mark.parametrize("rate", [RATES[0], *(pytest.param(rate, marks=pytest.mark.slow) for rate in RATES[1:])])
async def test_a4_planted_faults_in_a_slot_are_refused_by_name(mixture, rate):
    """Right syncs are never refused, wrong slots always, and then the server serves what it served before."""
    server, plot, config = mixture
    masters = Masters(config, rate)
    info = AdapterInfo("tiny", RANK, ALPHA, TARGETS)
    old = masters.stepped()
    plan = make_plan(describe(old), bucket_bytes=1 << 14)
    endpoint = Endpoint(server.root_url, server.api_key)
    pusher = AdapterPusher(endpoint, GlooSender(60.0), plan, adapter_config(info, config), deadline_s=60.0)
    try:
        assert (await asyncio.to_thread(pusher.push, old, "policy@1")).compared
        scored = await server.score("policy@1", TOKENS)
        new = masters.stepped()
        for fault, message in FAULTS.items():
            name = a_changed(old, new, f"lora_{fault[-1]}") if fault.startswith("stale") else ""
            kind = "stale matrix" if name else fault
            with (
                plot.planted(kind=kind, name=name),
                pytest.raises(MismatchError, match=r"policy@2") as caught,
            ):
                await asyncio.to_thread(pusher.push, new, "policy@2")
            assert re.search(message.format(name=re.escape(name)), str(caught.value)), (fault, str(caught.value))
            assert await server.models() == ["base", "policy@1"]
        assert await server.score("policy@1", TOKENS) == scored
        assert (await server.memory())[0]["adapters"] == sum(tensor.nbytes for _, tensor in old)
        for number in range(2, 6):
            assert (await asyncio.to_thread(pusher.push, masters.stepped(), f"policy@{number}")).compared
    finally:
        pusher.close()
        for name in (await server.models())[1:]:
            await server.unload_adapter(name)


def moved(weights, rate: float, seed: int):
    """Weights after a step of the optimizer, rounded to bf16."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, (w.float() + rate * torch.randn(w.shape, generator=generator).sign()).bfloat16()) for name, w in weights
    ]


async def merged_server(runtime, folder, run):
    plot = Plot(runtime, run / "plugin")
    config = ServerConfig(
        model=folder,
        served_name="policy@0",
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=8,
        threads=1,
        plain_weights=True,
        extra_args=EXTENSION,
    )
    return await launch(config, plot.runtime, run), plot


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("llama3", "direct"),
        pytest.param("qwen3_moe", "direct", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "load_weights", marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe", "direct", marks=pytest.mark.slow),
    ],
)
async def test_a4_a_merged_tensor_left_at_the_version_before_is_refused_by_name(runtime, tmp_path, family, path):
    """At the smallest rate most of bf16's elements don't change; the digest sees those that do. The server can't go on, and ends."""
    folder = write_tiny(family, tmp_path / "model", seed=random.randrange(10_000), overrides={"dtype": "bfloat16"})
    server, plot = await merged_server(runtime, folder, tmp_path)
    old = [(name, weight.bfloat16()) for name, weight in load_file(folder / "model.safetensors").items()]
    plan = make_plan(describe(old), bucket_bytes=1 << 16)
    pusher = WeightPusher(Endpoint(server.root_url, server.api_key), GlooSender(60.0), plan, deadline_s=60.0)

    def push(weights, number: int):
        return asyncio.to_thread(pusher.push, weights, f"policy@{number}", f"policy@{number}")

    try:
        if path == "direct":  # the first goes through load_weights
            for number, rate in enumerate(RATES, 1):
                new = moved(old, rate, number)
                assert (await push(new, number)).compared
                old = new
        new = moved(old, 1e-6, 9)
        pairs = [(name, before, other) for (name, before), (_, other) in zip(old, new, strict=True)]
        name = random.choice(
            [name for name, before, other in pairs if "proj" in name and not torch.equal(before, other)]
        )
        shown = re.sub(r"\.experts\.\d+\..*", ".experts", name)
        fault = {"weight": shown} if path == "direct" else {"loaded": name, "folder": str(folder)}
        with plot.planted(**fault), pytest.raises(ServerLostError, match=f"does not hold policy@9: '{shown}'"):
            await push(new, 9)
        await asyncio.to_thread(server.child.wait, 60.0)
    finally:
        pusher.close()
        await server.close()
