"""The live objects that faults are planted in, each with the measurement of the stage that must
detect them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from lockstep.engine.state import TrainerState
from lockstep.inference.tokenizer_files import read_tokenizer
from lockstep.validate.faults.served_faults import ServedAdapters, ServedWeights
from lockstep.validate.figures import Figure
from lockstep.validate.reference.parity import (
    ADAPTER_ALPHA,
    ADAPTER_RANK,
    adapter_reference,
    measure_parity,
    weight_reference,
)
from lockstep.validate.reference.trainers import adapter_trainer, weights_trainer
from lockstep.validate.request import Request
from lockstep.validate.stages.engine import hf_parity, packing_invariance, weight_round_trip
from lockstep.validate.stages.engine.expert_replay import Replay
from lockstep.validate.stages.engine.lora_coverage import Coverage
from lockstep.validate.stages.files import tokenizer_and_template


class Bench(Protocol):
    """live: what a fault is planted in."""

    live: Any

    def measure(self) -> list[Figure]: ...


class _Trained:
    """A trainer whose weights every measurement brings back."""

    def __init__(self, trainer: TrainerState) -> None:
        self.live = trainer
        self._masters = [bucket.master.clone() for bucket in trainer.optimizer.buckets]

    def restore(self) -> None:
        optimizer = self.live.optimizer
        for bucket, master in zip(optimizer.buckets, self._masters, strict=True):
            bucket.master.copy_(master)
        optimizer.restore_weights()
        optimizer.zero()


class WeightsBench(_Trained):
    """hf_parity with all weights trained."""

    def __init__(self, request: Request) -> None:
        self._batch, self._slope_P = hf_parity.problem(request.seed)
        self._reference = weight_reference(request.base_model, self._batch, self._slope_P)
        super().__init__(weights_trainer(request.base_model))

    def measure(self) -> list[Figure]:
        try:
            return measure_parity(self.live, self._batch, self._slope_P, self._reference)[0]
        finally:
            self.restore()


class AdaptersBench(_Trained):
    """hf_parity with adapters."""

    def __init__(self, request: Request) -> None:
        self._batch, self._slope_P = hf_parity.problem(request.seed)
        trainer, adapters = adapter_trainer(request.base_model, request.seed)
        scale = ADAPTER_ALPHA / ADAPTER_RANK
        self._reference = adapter_reference(request.base_model, self._batch, self._slope_P, adapters, scale)
        super().__init__(trainer)

    def measure(self) -> list[Figure]:
        try:
            return measure_parity(self.live, self._batch, self._slope_P, self._reference)[0]
        finally:
            self.restore()


class PackingBench:
    """packing_invariance."""

    def __init__(self, request: Request) -> None:
        self._trees, plain, self._slope_P = packing_invariance.problem(request.seed)
        self.live = weights_trainer(request.base_model)
        self._expected = packing_invariance.reference(self.live, plain, self._slope_P)

    def measure(self) -> list[Figure]:
        try:
            return packing_invariance.measure(self.live, self._trees, self._slope_P, self._expected)
        finally:
            self.live.optimizer.zero()


class RoundTripBench:
    """weight_round_trip at TP 2, or 3 where only that divides the model, and at EP 2.

    spoil: what happens to the ranks' parameters before they are written.
    """

    def __init__(self, request: Request) -> None:
        self.live = self
        self.spoil: weight_round_trip.Spoiled | None = None
        self._model = weight_round_trip.open_model(request)
        experts = 2 if self._model.config.is_moe else 1
        wanted = [(2, experts, 1, 1), (2, 1, 1, 1), (3, 1, 1, 1)]
        self._sizes = next((s for s in wanted if weight_round_trip.divides(self._model.config, s)), (1, 1, 1, 1))

    def measure(self) -> list[Figure]:
        return [weight_round_trip.measure(self._model, self._sizes, self.spoil)]


class TemplateBench:
    """tokenizer_and_template. templates: the server's, without and with tools."""

    def __init__(self, request: Request) -> None:
        self.live = self
        self.tokenizer = tokenizer_and_template.load_tokenizer(request)
        files = read_tokenizer(request.base_model, request.server_args)
        self.templates = (files.template, files.tool_template)
        self._rows = max(self.tokenizer.get_vocab().values()) + 1

    def measure(self) -> list[Figure]:
        return tokenizer_and_template.measure(self.tokenizer, self.templates, self._rows, ())


class CoverageBench(Coverage):
    """lora_coverage."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.base_model, request.seed, request.folder)
        self.live = self


BENCHES: dict[str, Callable[[Request], Bench]] = {
    "weights": WeightsBench,
    "adapters": AdaptersBench,
    "packing": PackingBench,
    "round trip": RoundTripBench,
    "template": TemplateBench,
    "coverage": CoverageBench,
    "replay": Replay,
    "served adapters": ServedAdapters,
    "served weights": ServedWeights,
}
"""By the name in a fault's `bench`."""
