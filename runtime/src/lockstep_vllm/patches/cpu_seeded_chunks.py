"""A seeded request whose prompt is computed in several pieces keeps its noise on a CPU.

vLLM samples after each piece and discards all but the last token. To take a discarded draw back it
moves the request's generator by an offset, which a generator on a CPU does not have: the server
ends. Here the generator's state from before the draw comes back.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import numpy as np


def apply() -> None:
    """Wraps vLLM's two steps around a draw. For the CPU platform only."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    sample, bookkeeping = GPUModelRunner._sample, GPUModelRunner._bookkeeping_sync

    def _sample(self, *args: Any, **options: Any):
        states = [(generator, generator.get_state()) for generator in _discarded(self).values()]
        output = sample(self, *args, **options)
        for generator, state in states:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **options: Any):
        hidden, generators = _discarded(self), self.input_batch.generators
        for index in hidden:
            del generators[index]
        try:
            return bookkeeping(self, *args, **options)
        finally:
            generators.update(hidden)

    GPUModelRunner._sample = _sample
    GPUModelRunner._bookkeeping_sync = _bookkeeping_sync


def _discarded(runner: Any) -> dict[int, Any]:
    """Generators of the batch's requests whose token will be discarded, by their index."""
    mask = runner.discard_request_mask.np[: runner.input_batch.num_reqs]
    generators = runner.input_batch.generators
    return {index: generators[index] for index in np.nonzero(mask)[0].tolist() if index in generators}
