"""A request's expert routes leave the engine once, when it ends, and not a row with every token.

A reply has its routes at its end only. vLLM 0.32 still sends each token's row from the engine's process to the API's by itself: one more
array to write, send and read per token, a tenth and more of all that the API process does for a token, which becomes the server's limit
before the GPU does. Here the engine keeps the rows until then. What arrives is the same bytes.

A request with stop strings is left as it is: the API process is the one that finds them, and ends the request without asking the engine for
more. A request that is ended from outside (its client left) has no routes.

`tests/runtime/test_route_handover.py` fails when vLLM hands over once by itself, and this is no longer needed.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import numpy as np


def apply() -> None:
    """Called once in each process of vLLM; only the engine's has such a connector."""
    from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector as Connector

    original_init, original_take, original_end = Connector.__init__, Connector.take_output, Connector.request_finished

    def init(self) -> None:
        original_init(self)
        self.lockstep_kept = {}

    def take_output(self, request, output) -> np.ndarray | None:
        rows_SLK = original_take(self, request, output)
        if request.sampling_params.stop:
            return rows_SLK
        return _keep(self.lockstep_kept, request.request_id, rows_SLK, last=request.is_finished())

    def request_finished(self, request) -> None:
        self.lockstep_kept.pop(request.request_id, None)
        original_end(self, request)

    Connector.__init__ = init
    Connector.take_output = take_output
    Connector.request_finished = request_finished


def _keep(kept: dict[str, Any], request_id: str, rows_SLK: np.ndarray | None, *, last: bool) -> np.ndarray | None:
    """Adds a step's rows (S tokens, L layers, K experts) to those of its request; all of them with the last, else nothing."""
    if rows_SLK is not None:
        # Copied: the rows are a view into those of every request of the step, which would stay with them.
        kept.setdefault(request_id, bytearray()).extend(rows_SLK.tobytes())
    if not last:
        return None
    assert rows_SLK is not None  # vLLM's own promise for a request that ended
    return np.frombuffer(kept.pop(request_id), rows_SLK.dtype).reshape(-1, *rows_SLK.shape[1:])
