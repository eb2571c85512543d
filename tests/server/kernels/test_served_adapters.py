"""vLLM serves our adapter files with the logprobs of the merged weights: attention, GatedDeltaNet, MLP and experts, layout by layout."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from adapters import Model, hugging_face, random_adapter, released
from checkpoints import release
from lockstep.inference.client import Server
from lockstep.inference.environment.locate import Runtime
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.models.tiny.write import write_tiny

pytestmark = [pytest.mark.server, pytest.mark.slow]


@dataclass(frozen=True)
class Case:
    """form "released": the multimodal class with stacked experts. noise: largest mean error of the base model's logprobs.

    Qwen3.5 runs in bfloat16, the only type that vLLM's CPU kernels for GatedDeltaNet know.
    """

    key: str
    form: str
    dtype: Literal["float32", "bfloat16"]
    noise: float


CASES = (
    Case("llama3", "text", "float32", 1e-5),
    Case("qwen3_moe", "text", "float32", 1e-5),
    Case("qwen3_5", "text", "bfloat16", 0.04),
    Case("qwen3_5_moe", "text", "bfloat16", 0.04),
    Case("qwen3_5_moe", "released", "bfloat16", 0.04),
)


def hf_logprobs(folder: Path, form: str, tokens: list[int]) -> torch.Tensor:
    """Log-probability of every token after the first, Hugging Face in fp32."""
    model = hugging_face(folder) if form == "text" else released(folder)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


async def served(server: Server, name: str, tokens: list[int]) -> torch.Tensor:
    return torch.tensor(await server.score(name, tokens))


def token_lists(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (17, 40, 64)]


async def check_text_prompts(server: Server) -> None:
    """A text is completed as its tokens are; for GatedDeltaNet on a CPU the server first counts them, with a call to itself."""
    prompts = ["the cat sat", "on the mat again"]
    body = {"model": "base", "max_tokens": 3, "ignore_eos": True}
    replies = await asyncio.gather(*(server.call("POST", "/v1/completions", body | {"prompt": p}) for p in prompts))
    for text, reply in zip(prompts, replies, strict=True):
        choice = reply.json()["choices"][0]
        tokens = (await server.call("POST", "/tokenize", {"prompt": text})).json()["tokens"]
        assert choice["prompt_token_ids"] == tokens
        assert len(choice["token_ids"]) == 3


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.key}-{c.form}")
async def test_vllm_serves_what_merging_gives(case: Case, runtime: Runtime, tmp_path: Path) -> None:
    base = write_tiny(case.key, tmp_path / "text", seed=21)
    if case.form == "released":
        base = release(base, tmp_path / "base")
    model = Model(base)
    config = ServerConfig(
        model=base,
        served_name="base",
        dtype=case.dtype,
        lora=LoraServing(max_rank=8, targets=tuple(sorted({site.target for site in model.sites}))),
        max_model_len=128,
        max_num_seqs=8,
        threads=1,
    )
    server = await launch(config, runtime, tmp_path / "run")
    try:
        for version in (1, 2):
            adapter = random_adapter(model.sites, version)
            folder = model.write(tmp_path / f"adapter{version}", adapter, model.targets)
            merged = model.merge(adapter, tmp_path / f"merged{version}")
            await server.load_adapter(f"policy@{version}", folder)
            for tokens in token_lists(version):
                reference = hf_logprobs(merged, case.form, tokens)
                effect = (reference - hf_logprobs(base, case.form, tokens)).abs().mean()
                error = (await served(server, f"policy@{version}", tokens) - reference).abs().mean()
                noise = (await served(server, "base", tokens) - hf_logprobs(base, case.form, tokens)).abs().mean()
                assert noise < case.noise
                assert effect > 0.5
                assert error < 3 * case.noise
        await check_text_prompts(server)
    finally:
        await server.close()


async def test_dense_model_on_the_shared_server(server: Server, tiny_qwen3: Path, tmp_path: Path) -> None:
    model = Model(tiny_qwen3)
    adapter = random_adapter(model.sites, 4)
    await server.load_adapter("families@1", model.write(tmp_path / "adapter", adapter, model.targets))
    try:
        merged = model.merge(adapter, tmp_path / "merged")
        for tokens in token_lists(4):
            reference = hf_logprobs(merged, "text", tokens)
            assert (await served(server, "families@1", tokens) - reference).abs().max() < 2e-5
            assert (await served(server, "base", tokens) - reference).abs().mean() > 0.2
    finally:
        await server.unload_adapter("families@1")


def test_vllm_still_picks_gpu_experts_on_a_cpu(runtime: Runtime) -> None:
    """The fault that `moe_lora_cpu` repairs. When this fails, vLLM has a CPU class of its own: drop ours."""
    code = (
        "from types import SimpleNamespace\n"
        "from vllm.model_executor.layers.fused_moe.oracle import unquantized\n"
        "print(unquantized.select_unquantized_moe_backend(SimpleNamespace(is_lora_enabled=True, moe_backend='auto'))[0])\n"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "VLLM_PLUGINS": "",
        "PYTHONPATH": str(runtime.plugin_path),
        "VLLM_NO_USAGE_STATS": "1",
    }
    done = subprocess.run(
        [str(runtime.python), "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "UnquantizedMoeBackend.TRITON"
