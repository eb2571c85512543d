"""What native_vllm_lora and merged_vllm_serving measure: two trained steps, as the server answers
for them, against Hugging Face with the published adapters.
"""

from __future__ import annotations

from typing import Any

import lockstep as ls
from lockstep.models.config import checkpoint_dtype
from lockstep.runs.store import published_steps
from lockstep.validate.figures import Figure, Outcome, count, judged
from lockstep.validate.reference.served import adapted_logprobs, read_step, step_figures
from lockstep.validate.request import Request
from lockstep.validate.stages.server.served_run import PROMPTS, opened, rollouts

_STEPS = 2
_TRIES, _TOKENS = 3, 4
_PROBE = 64
_CONFIG = {"learning_rate": 1e-2, "max_mismatch": None, "max_grad_norm": None}
"""A rate at which one step moves the policy far beyond the noise between two programs."""


async def serve_steps(request: Request, mode: str) -> Outcome:
    """The outcome of the stage for `mode`."""
    served, notes = [], []
    verified: list[dict[str, float]] = []
    async with opened(request, mode) as (backend, model):
        ids = probe(request)
        for number in range(_STEPS + 1):
            if number:
                groups = await rollouts(model, _TRIES, _reward, _TOKENS, PROMPTS[:4])
                result = await backend.train(model, groups, ls.TrainConfig(**_CONFIG))
                verified.append(result.metrics)
            server = backend.run_info(model).server
            served.append(await server.score(model.inference_name(), ids))
        names = await backend.run_info(model).server.models()
        path = backend.run_path(model)
        dtype = request.dtype or checkpoint_dtype(request.base_model)
        steps = [read_step(request.base_model, path / "steps" / f"{n:04d}" / "adapter") for n in published_steps(path)]
    request.say("Hugging Face with the published adapters")
    expected = adapted_logprobs(request.base_model, steps, ids)
    figures = step_figures(served, expected, request.family, dtype)
    notes.append(f"served names: {', '.join(names)}")
    notes += [f"verification_power {metrics.get('verification_power', 0):.2g}" for metrics in verified]
    return judged([*figures, _named(names)], notes)


def _named(names: list[str]) -> Figure:
    wanted = f"checked@{_STEPS}"
    return count("newest step without a name", int(wanted not in names), where="" if wanted in names else wanted)


def probe(request: Request) -> list[int]:
    """Token ids of a fixed text."""
    from lockstep.validate.stages.files.tokenizer_and_template import load_tokenizer

    text = "The river is wide, and the moon is above it. def add(a, b): return a + b. Yes, no, maybe. " * 4
    return load_tokenizer(request).encode(text, add_special_tokens=False)[:_PROBE]


def _reward(choice: Any) -> float:
    """Something that differs between replies: a share of their tokens."""
    ids = choice.token_ids
    return sum(token % 3 == 0 for token in ids) / max(1, len(ids))
