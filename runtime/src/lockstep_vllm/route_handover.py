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

import numpy as np


def apply() -> None:
    """Called once in each process of vLLM; only the engine's has such a connector."""
    from vllm.distributed.aux_output_connector.connector import AuxOutputSchedulerConnector as Connector

    original = Connector.take_output

    def take_output(self, request, output) -> np.ndarray | None:
        """A step's rows (S tokens, L layers, K experts) are kept with their request, which gives all of them with its last."""
        rows_SLK = original(self, request, output)
        if request.sampling_params.stop:
            return rows_SLK
        kept = vars(request).setdefault("lockstep_rows", bytearray())
        if rows_SLK is not None:
            # Copied: the rows are a view into those of every request of the step, which would stay with them.
            kept.extend(rows_SLK.tobytes())
        if not request.is_finished():
            return None
        del request.lockstep_rows
        assert rows_SLK is not None  # vLLM's own promise for a request that ended
        return np.frombuffer(kept, rows_SLK.dtype).reshape(-1, *rows_SLK.shape[1:])

    Connector.take_output = take_output
