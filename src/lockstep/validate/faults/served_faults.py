"""Faults in what a server answers for a step. Hugging Face's program stands in for the server.

Shapes: T tokens of the probe after its first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lockstep.models.config import ModelConfig
from lockstep.validate.faults.fault import Fault, replaced
from lockstep.validate.figures import Figure
from lockstep.validate.reference.hugging_face import hugging_face
from lockstep.validate.reference.parity import ADAPTER_ALPHA, ADAPTER_RANK, random_adapters
from lockstep.validate.reference.served import adapted_logprobs, logprobs_of, step_figures
from lockstep.validate.reference.trainers import adapter_trainer
from lockstep.validate.request import Request

_PROBE = 48


def _probe(seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 200, _PROBE)]


class ServedAdapters:
    """Three steps of adapters, and the log-probabilities that a server answers with for each.

    holds: the step that the server holds under each step's name.
    """

    def __init__(self, request: Request) -> None:
        self.live = self
        self.holds = [0, 1, 2]
        trainer, _ = adapter_trainer(request.base_model, request.seed)
        scale = ADAPTER_ALPHA / ADAPTER_RANK
        steps = [(random_adapters(trainer, request.seed + number), scale) for number in range(3)]
        self._answers = adapted_logprobs(request.base_model, steps, _probe(request.seed))
        self._family = request.family

    def measure(self) -> list[Figure]:
        served = [self._answers[step].tolist() for step in self.holds]
        return step_figures(served, self._answers, self._family, "float32")


class ServedWeights:
    """A step that changed the embedding, which is also the LM head.

    head_follows: the server's head is the new embedding.
    """

    def __init__(self, request: Request) -> None:
        self.live = self
        self.head_follows = True
        self._folder, self._seed, self._family = request.base_model, request.seed, request.family
        self._before_T = self._answer(0.0, True)
        self._after_T = self._answer(0.05, True)

    @torch.no_grad()
    def _answer(self, change: float, follows: bool) -> np.ndarray:
        model = hugging_face(self._folder)
        embedding = model.get_input_embeddings().weight
        if not follows:
            model.lm_head.weight = torch.nn.Parameter(embedding.clone())
        generator = torch.Generator().manual_seed(self._seed)
        embedding += torch.randn(embedding.shape, generator=generator) * embedding.std() * change
        return logprobs_of(model, _probe(self._seed))

    def measure(self) -> list[Figure]:
        served = [self._before_T.tolist(), self._answer(0.05, self.head_follows).tolist()]
        return step_figures(served, [self._before_T, self._after_T], self._family, "float32")


@contextmanager
def stale_adapter(bench: ServedAdapters) -> Iterator[None]:
    with replaced(bench, "holds", [0, 1, 1]):
        yield


@contextmanager
def head_left_behind(bench: ServedWeights) -> Iterator[None]:
    with replaced(bench, "head_follows", False):
        yield


def _tied(config: ModelConfig) -> bool:
    return config.tied


SERVED_FAULTS = (
    Fault("a stale adapter served", "a cache key names the adapter and not its version", "native_vllm_lora",
          "served adapters", stale_adapter),
    Fault("a tied head left behind", "the sync writes the embedding and not the head's own copy", "merged_vllm_serving",
          "served weights", head_left_behind, _tied),
)  # fmt: skip
"""Planted in what the stages with a server compare."""
