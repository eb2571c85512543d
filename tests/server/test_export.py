"""`lockstep export` of every family, as a user calls it: what vLLM computes from the folder is what the trainer computes."""

from __future__ import annotations

import asyncio

import pytest
from rich.console import Console

from adapter_runs import FAMILIES, run_of
from lockstep.backends.megatron.launch import serving_of
from lockstep.cli.export.check import text_ids
from lockstep.cli.export.command import export_run
from lockstep.inference.launch import launch


async def _scores(runtime, run, folders) -> list[list[float]]:
    """Each adapter folder in one server, next to each other."""
    config, _ = serving_of(run, 1)
    server = await launch(config, runtime, run)
    try:
        for number, folder in enumerate(folders):
            await server.load_adapter(f"adapter-{number}", folder)
        return [await server.score(f"adapter-{number}", text_ids(config.model)) for number in range(len(folders))]
    finally:
        await server.close()


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_transformers_and_in_vllm(runtime, tmp_path, family, dtype):
    """Both kinds pass the checks of both programs. vLLM computes from the PEFT folder exactly what it does from the step.

    vLLM on a CPU has no Qwen3.5 in float32, and no adapter of it on in_proj_a, which these have: the export says so.
    """
    run = run_of(tmp_path, family, dtype, said_rank=8)
    console = Console(width=120, record=True)
    for merge, target in ((True, tmp_path / "merged"), (False, tmp_path / "adapter")):
        export_run(run, target, "1", merge, None, console)
        assert "| transformers | " in (target / "README.md").read_text()
    said = console.export_text()
    if family.startswith("qwen3_5"):
        assert said.count("vLLM against the trainer") == (dtype == "bfloat16")
        assert "not checked in vLLM: the server" in said
        return
    assert said.count("vLLM against the trainer") == 2
    step = run / "steps" / "0001" / "adapter"
    of_step, of_export, of_other = asyncio.run(
        _scores(runtime, run, [step, tmp_path / "adapter", run / "steps" / "0002" / "adapter"])
    )
    assert of_export == of_step
    assert of_other != of_step
