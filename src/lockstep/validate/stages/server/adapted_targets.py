"""The effect of each LoRA target in the server, for lora_coverage: one adapter for each target, that
changes nothing else, against Hugging Face with the same adapter.

Shapes: T tokens of the probe after its first.
"""

from __future__ import annotations

import asyncio

import numpy as np

from lockstep.inference.environment.install import find_runtime
from lockstep.inference.launch import LoraServing, ServerConfig, launch
from lockstep.models.config import checkpoint_dtype
from lockstep.models.registry import default_target_modules_for_model
from lockstep.validate.figures import Figure, figure
from lockstep.validate.random_adapter import RANK, write_random_adapter
from lockstep.validate.reference.served import adapted_logprobs, read_step
from lockstep.validate.request import Request
from lockstep.validate.stages.server.served_steps import probe
from lockstep.validate.tolerances import limit_of

_STRENGTH = 0.4
"""Four times an adapter on all targets: one alone must change the model beyond bf16's noise."""


async def served_targets(request: Request) -> list[Figure]:
    """One figure: for each target, how far the server is from the adapted model, over the distance
    to the base model.
    """
    targets = tuple(default_target_modules_for_model(str(request.base_model)))
    dtype = request.dtype or checkpoint_dtype(request.base_model)
    ids, home = probe(request), request.folder / "targets"
    folders = [
        await asyncio.to_thread(
            write_random_adapter, request.base_model, home / target, request.seed, dtype, (target,), _STRENGTH
        )
        for target in targets
    ]
    served_T = [np.array(answers) for answers in await _served(request, targets, dtype, ids)]
    request.say("Hugging Face with each target's adapter")
    steps = [read_step(request.base_model, folder) for folder in folders]
    base_T, *wanted_T = adapted_logprobs(request.base_model, [({}, 1.0), *steps], ids)
    shares = [_share(*answers) for answers in zip(served_T, wanted_T, [base_T] * len(targets), strict=True)]
    name = "server: distance to the adapted model over that to the base"
    return [figure(name, shares, targets, limit_of("stale share", dtype))]


def _share(served_T: np.ndarray, wanted_T: np.ndarray, base_T: np.ndarray) -> float:
    return float(np.abs(served_T - wanted_T).mean() / max(np.abs(served_T - base_T).mean(), 1e-12))


async def _served(request: Request, targets: tuple[str, ...], dtype: str, ids: list[int]) -> list[list[float]]:
    """The server's log-probabilities with each target's adapter."""
    config = ServerConfig.model_validate(
        {
            "model": request.base_model,
            "served_name": "validate@base",
            "dtype": dtype,
            "lora": LoraServing(max_rank=RANK, targets=targets),
            "max_model_len": 2 * len(ids),
            "gpus": (0,) if request.device == "cuda" else (),
            "seed": request.seed,
            "extra_args": request.server_args,
        }
    )
    server = await launch(config, find_runtime(request.device), request.folder, request.say)
    answers = []
    try:
        for target in targets:
            request.say(f"serving an adapter on {target}")
            await server.load_adapter(f"only@{target}", request.folder / "targets" / target)
            answers.append(await server.score(f"only@{target}", ids))
            await server.unload_adapter(f"only@{target}")
    finally:
        await server.close()
    return answers
