"""Adapters from memory against the same adapters from a folder, and against PEFT."""

from __future__ import annotations

import asyncio
import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import sender_ranks
from lockstep.engine.weight_sync.buckets import describe
from lockstep.engine.weight_sync.plan import make_plan
from lockstep.engine.weight_sync.sender import AdapterPusher, Endpoint
from lockstep.errors import MismatchError, ServerError, WeightsError
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.models.tiny.write import write_tiny
from lockstep.process.child import child_env, spawn
from lockstep.testing.in_flight import seen_running
from lockstep.testing.programs import torchrun
from lockstep_wire.transports.gloo import GlooSender
from sync_driver import flip_one_bit, hf_logprobs, load

pytestmark = pytest.mark.server

NOT_PLANNED = "no planned copies for adapters"
"""What the server's log says where an adapter goes through vLLM's own loading."""
TOKENS = torch.randint(3, 320, (40,), generator=torch.Generator().manual_seed(31)).tolist()


def adapter(model_folder, folder, seed: int, rank: int = 4):
    """A PEFT folder with both factors random: its tensors, its config, and what PEFT scores with it."""
    torch.manual_seed(seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(load(model_folder), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tensors = sorted(load_file(folder / "adapter_model.safetensors").items())
    config = json.loads((folder / "adapter_config.json").read_text())
    return tensors, config, hf_logprobs(PeftModel.from_pretrained(load(model_folder), folder), TOKENS)


def make_pusher(server, tensors, config):
    plan = make_plan(describe(tensors), bucket_bytes=4000)
    assert len(plan.buckets) > 10
    endpoint = Endpoint(server.root_url, server.api_key)
    return AdapterPusher(endpoint, GlooSender(60.0), plan, config, deadline_s=100.0)


async def served(server, name: str) -> torch.Tensor:
    return torch.tensor(await server.score(name, TOKENS))


async def test_versions_from_memory(server, tiny_qwen3, tmp_path):
    made = {f"live@{seed}": adapter(tiny_qwen3, tmp_path / f"{seed}", seed) for seed in (1, 2, 3)}
    pusher = make_pusher(server, *made["live@1"][:2])
    for name, (tensors, _, expected_S) in made.items():
        report = await asyncio.to_thread(pusher.push, tensors, name)
        assert report.nbytes == sum(tensor.nbytes for _, tensor in tensors)
        torch.testing.assert_close(await served(server, name), expected_S, atol=1e-5, rtol=0)
    assert NOT_PLANNED not in server.child.log_path.read_text()
    # All stay served, each as itself, and the same bytes from the folder score the same.
    for name, (_, _, expected_S) in made.items():
        torch.testing.assert_close(await served(server, name), expected_S, atol=1e-5, rtol=0)
    await server.load_adapter("disk@2", tmp_path / "2")
    assert torch.equal(await served(server, "disk@2"), await served(server, "live@2"))
    with pytest.raises(WeightsError, match="already been loaded"):
        await asyncio.to_thread(pusher.push, made["live@3"][0], "live@1")
    torch.testing.assert_close(await served(server, "live@1"), made["live@1"][2], atol=1e-5, rtol=0)
    # A name that comes back with other weights meets no cached keys and values of before.
    await server.unload_adapter("live@1")
    await asyncio.to_thread(pusher.push, made["live@3"][0], "live@1")
    torch.testing.assert_close(await served(server, "live@1"), made["live@3"][2], atol=1e-5, rtol=0)
    pusher.close()
    for name in ("live@1", "live@2", "live@3", "disk@2"):
        await server.unload_adapter(name)
    assert await server.models() == ["base"]


async def slot_bytes(server) -> int:
    """Bytes of adapters from memory that the server keeps."""
    return (await server.call("GET", "/lockstep/memory")).json()["workers"][0]["adapters"]


async def test_torn_or_impossible_adapters_leave_what_is_served(server, tiny_qwen3, tmp_path, monkeypatch):
    tensors, config, expected_S = adapter(tiny_qwen3, tmp_path / "good", 5)
    pusher = make_pusher(server, tensors, config)
    await asyncio.to_thread(pusher.push, tensors, "torn@1")
    with pytest.raises(WeightsError, match="end before"):
        await asyncio.to_thread(pusher.push, tensors[:-2], "torn@2")
    flip_one_bit(monkeypatch, pusher._transport)
    with pytest.raises(MismatchError, match="bucket 3"):
        await asyncio.to_thread(pusher.push, tensors, "torn@2")
    monkeypatch.undo()
    nbytes = sum(tensor.nbytes for _, tensor in tensors)
    assert await slot_bytes(server) == nbytes
    assert await server.models() == ["base", "torn@1"]
    torch.testing.assert_close(await served(server, "torn@1"), expected_S, atol=1e-5, rtol=0)
    await asyncio.to_thread(pusher.push, tensors, "torn@2")
    torch.testing.assert_close(await served(server, "torn@2"), expected_S, atol=1e-5, rtol=0)
    pusher.close()
    strange = [(name.replace("layers.0.", "layers.77."), tensor) for name, tensor in tensors]
    pusher = make_pusher(server, strange, config)
    with pytest.raises(WeightsError, match=r"layers\.77"):
        await asyncio.to_thread(pusher.push, strange, "torn@3")
    pusher.close()
    pusher = make_pusher(server, tensors, config | {"r": 64})
    with pytest.raises(WeightsError, match="rank"):
        await asyncio.to_thread(pusher.push, tensors, "torn@3")
    pusher.close()
    with pytest.raises(WeightsError, match="listed twice"):
        make_pusher(server, [*tensors, tensors[0]], config)
    assert await server.models() == ["base", "torn@1", "torn@2"]
    assert await slot_bytes(server) == 2 * nbytes
    for name in ("torn@1", "torn@2"):
        await server.unload_adapter(name)
    assert await slot_bytes(server) == 0
    with pytest.raises(ServerError, match="torn@1"):
        await served(server, "torn@1")


async def test_a_request_in_flight_keeps_the_adapter_that_is_unloaded(server, tiny_qwen3, tmp_path):
    """It ends as it began, although others take the place of its adapter meanwhile; then the memory is free."""
    tensors, config, _ = adapter(tiny_qwen3, tmp_path / "kept", 8)
    pusher = make_pusher(server, tensors, config)
    await asyncio.to_thread(pusher.push, tensors, "kept")
    body = {"model": "kept", "prompt": TOKENS, "max_tokens": 400, "temperature": 0.0, "ignore_eos": True}

    async def sample() -> list[int]:
        reply = (await server.call("POST", "/v1/completions", body, deadline_s=100.0)).json()
        return reply["choices"][0]["token_ids"]

    expected = await sample()
    running = await seen_running(server, sample)
    await server.unload_adapter("kept")
    others = [f"other@{number}" for number in range(9)]
    for name in others:
        await asyncio.to_thread(pusher.push, tensors, name)
    assert await running == expected
    pusher.close()
    for name in others:
        await server.unload_adapter(name)
    assert await slot_bytes(server) == 0


def run_ranks(folder, server, tmp_path, **job):
    """Two trainer ranks send adapters; what they wrote at the end. Blocks."""
    answer, port = tmp_path / "answer.json", int(server.root_url.rpartition(":")[2])
    job |= {"tokens": TOKENS, "port": port, "api_key": server.api_key, "answer": str(answer), "adapter": True}
    job["settings"] |= {"model": str(folder)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = torchrun(2, sender_ranks.__file__, str(tmp_path / "job.json"))
    child = spawn(command, child_env({"OMP_NUM_THREADS": "1"}), tmp_path / "log", "two ranks")
    assert child.wait(600.0) == 0, child.log_tail(40)
    return json.loads(answer.read_text())


def merged_reference(folder, tensors, modules, seed, where):
    """What Hugging Face scores with the ranks' random adapter merged in."""
    shutil.copytree(folder, where, ignore=shutil.ignore_patterns("*.safetensors*"))
    merged = sender_ranks.merged(tensors, sender_ranks.adapter(modules, seed))
    save_file(merged, where / "model.safetensors", metadata={"format": "pt"})
    return hf_logprobs(load(where), TOKENS)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.slow
async def test_adapters_from_two_trainer_ranks(server, tiny_qwen3, tmp_path):
    """Matrices split over two ranks, each sent by the rank that holds it; all versions stay served, each as itself."""
    lora = {"rank": sender_ranks.RANK, "alpha": sender_ranks.SCALE * sender_ranks.RANK, "targets": TARGETS}
    settings = {"parallel": {"tensor": 2}, "lora": lora}
    answer = await asyncio.to_thread(run_ranks, tiny_qwen3, server, tmp_path, settings=settings, steps=3)
    base = load_file(tiny_qwen3 / "model.safetensors")
    modules = {
        name.removesuffix(".weight"): tuple(weight.shape) for name, weight in base.items() if "_proj.weight" in name
    }
    for step in (1, 2, 3):
        expected = merged_reference(tiny_qwen3, base, modules, step, tmp_path / f"{step}")
        torch.testing.assert_close(torch.tensor(answer["scores"][step - 1]), expected, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(await served(server, f"ranks@{step}"), expected, atol=1e-5, rtol=1e-6)
    assert answer["report"]["path"] == "adapter"
    assert answer["report"]["nbytes"] == sum(4 * sender_ranks.RANK * sum(shape) for shape in modules.values())
    assert max(answer["sizes"]) < 0.7 * sum(answer["sizes"])
    for step in (1, 2, 3):
        await server.unload_adapter(f"ranks@{step}")


async def test_an_adapter_that_fell_out_of_the_cache_comes_back_as_it_was(server, tiny_qwen3, tmp_path):
    """vLLM loads it again, and multiplies its B by alpha/r again."""
    tensors, config, expected_S = adapter(tiny_qwen3, tmp_path / "first", 6)
    pusher = make_pusher(server, tensors, config)
    await asyncio.to_thread(pusher.push, tensors, "first")
    pusher.close()
    torch.testing.assert_close(await served(server, "first"), expected_S, atol=1e-5, rtol=0)
    for other in range(8):  # as many as the server keeps
        await server.load_adapter(f"other@{other}", tmp_path / "first")
        await served(server, f"other@{other}")
    torch.testing.assert_close(await served(server, "first"), expected_S, atol=1e-5, rtol=0)
    for name in ("first", *(f"other@{other}" for other in range(8))):
        await server.unload_adapter(name)


@pytest.mark.slow
async def test_routed_experts_from_memory_as_from_a_folder(runtime, tmp_path):
    """One pair per expert, on every layer; what the folder's adapter does is shown against Hugging Face elsewhere."""
    folder = write_tiny("qwen3_moe", tmp_path / "moe", seed=3)
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    assert any(".experts.7.down_proj." in name for name in tensors)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets, "bias": "none"}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    serving = ServerConfig(
        model=folder,
        served_name="base",
        dtype="float32",
        lora=LoraServing(targets=(*targets, "experts")),
        max_model_len=128,
        max_num_seqs=4,
        threads=1,
    )
    server = await launch(serving, runtime, tmp_path / "run")
    try:
        pusher = make_pusher(server, sorted(tensors.items()), config)
        await asyncio.to_thread(pusher.push, sorted(tensors.items()), "live@1")
        await server.load_adapter("disk@1", tmp_path / "adapter")
        assert torch.equal(await served(server, "live@1"), await served(server, "disk@1"))
        assert (await served(server, "live@1") - await served(server, "base")).abs().mean() > 0.05
        assert (
            server.child.log_path.read_text().count(NOT_PLANNED) == 1
        )  # one pair per expert: they must be stacked first
        stacks: dict[str, dict[int, torch.Tensor]] = {}
        for name in [name for name in tensors if ".experts." in name]:
            owner, number, rest = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name).groups()
            stacks.setdefault(f"{owner}.{rest}", {})[int(number)] = tensors[name]
        stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        stacked |= {name: torch.stack([experts[i] for i in range(len(experts))]) for name, experts in stacks.items()}
        pusher.close()
        pusher = make_pusher(server, sorted(stacked.items()), config)
        await asyncio.to_thread(pusher.push, sorted(stacked.items()), "live@2")
        assert torch.equal(await served(server, "live@2"), await served(server, "disk@1"))
        assert server.child.log_path.read_text().count(NOT_PLANNED) == 1
        lora = {
            "rank": sender_ranks.RANK,
            "alpha": sender_ranks.SCALE * sender_ranks.RANK,
            "targets": ["q_proj", "experts"],
        }
        settings = {"parallel": {"tensor": 2, "expert": 2}, "lora": lora}
        answer = await asyncio.to_thread(run_ranks, folder, server, tmp_path, settings=settings, steps=2)
        base = load_file(folder / "model.safetensors")
        modules = {
            name.removesuffix(".weight"): tuple(weight.shape)
            for name, weight in base.items()
            if ".experts." in name or ".q_proj." in name
        }
        for step in (1, 2):
            expected = merged_reference(folder, base, modules, step, tmp_path / f"{step}")
            torch.testing.assert_close(torch.tensor(answer["scores"][step - 1]), expected, atol=1e-5, rtol=1e-6)
        pusher.close()
    finally:
        await server.close()
