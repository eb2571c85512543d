"""What a server that holds a step must answer: Hugging Face's log-probabilities with the step's
adapter merged.

Shapes: T tokens of the probe after its first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.metrics.mismatch import logprob_mismatch
from lockstep.models.checkpoint.peft import read_adapter
from lockstep.models.checkpoint.read import open_checkpoint
from lockstep.models.registry import get_model_support_handler, load_model_config
from lockstep.validate.figures import Figure, count, figure
from lockstep.validate.reference.hugging_face import hugging_face
from lockstep.validate.reference.parity import adapted_weights
from lockstep.validate.tolerances import limit_of


def read_step(base: Path, adapter: Path) -> tuple[dict[str, Tensor], float]:
    """(canonical tensors in fp32, alpha / rank) of a published step's adapter."""
    handler, config = get_model_support_handler(str(base)), load_model_config(str(base))
    checkpoint = open_checkpoint(base, handler, config)
    sites = [site for shard in handler.all_shards(config, checkpoint.layout) for site in shard.sites]
    tensors, info = read_adapter(adapter, sites, config, checkpoint.layout)
    return {name: tensor.float() for name, tensor in tensors.items()}, info.scale


@torch.no_grad()
def adapted_logprobs(
    base: Path, steps: Sequence[tuple[Mapping[str, Tensor], float]], ids: list[int]
) -> list[np.ndarray]:
    """float `[T]` for each step, in fp32."""
    model, logprobs = hugging_face(base), []
    named = dict(model.named_parameters())
    for adapters, scale in steps:
        views = list(adapted_weights(named, adapters))
        before = [view.clone() for _, view in views]
        for module, view in views:
            view.add_(adapters[f"{module}.lora_B"] @ adapters[f"{module}.lora_A"], alpha=scale)
        logprobs.append(logprobs_of(model, ids))
        for (_, view), weight in zip(views, before, strict=True):
            view.copy_(weight)
    return logprobs


@torch.no_grad()
def logprobs_of(model: Any, ids: list[int]) -> np.ndarray:
    """float `[T]`: a Hugging Face model's log-probability of each token after the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def step_figures(
    served: Sequence[Sequence[float]], expected: Sequence[np.ndarray], family: str, dtype: str
) -> list[Figure]:
    """Figures of the served steps, oldest first, against the expected ones."""
    figures: list[Figure] = []
    for number, (answers, wanted_T) in enumerate(zip(served, expected, strict=True)):
        answers_T = np.asarray(answers)
        values = logprob_mismatch(wanted_T, answers_T)
        places = [f"token {token}" for token in range(len(wanted_T))]
        differences = np.abs(answers_T - wanted_T).tolist()
        figures.append(figure(f"step {number}: |served - Hugging Face|", differences, places, unit="nats"))
        percent = limit_of(f"mismatch percent of {family}", dtype)
        figures.append(count(f"step {number}: mean difference", values.mean_abs_pct, percent, unit="%"))
        if number:
            other = float(np.abs(answers_T - expected[number - 1]).mean())
            share = values.mean_abs / max(other, 1e-12)
            name = "distance to its own weights over that to the step before"
            figures.append(count(f"step {number}: {name}", share, limit_of("stale share", dtype)))
    return figures
