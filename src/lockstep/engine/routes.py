"""Expert routes of a batch, checked before any layer replays them (`router.py`): Megatron uses replayed numbers unchecked.

Shapes: R rows, S row length, L mixture-of-experts layers, K experts per token.
"""

from __future__ import annotations

import numpy as np

from lockstep.errors import DataError
from lockstep.families.config import ModelConfig
from lockstep.tokens.batch import PackedBatch


def check_routes(batch: PackedBatch, config: ModelConfig) -> None:
    """Raise DataError unless the batch's routes, if any, fit the model: layers, experts per token, range, no expert twice."""
    if batch.routes_RSLK is None:
        return
    if not config.is_moe:
        raise DataError(
            "the batch has expert routes but the model has no experts; the rollouts belong to another model"
        )
    expected = (sum(config.moe_layers), config.experts_per_token)
    if batch.routes_RSLK.shape[2:] != expected:
        raise DataError(
            f"routes are for {batch.routes_RSLK.shape[2]} layers with {batch.routes_RSLK.shape[3]} experts per token, "
            f"the model has {expected[0]} with {expected[1]}; the rollouts belong to another model"
        )
    sorted_RSLK = np.sort(batch.routes_RSLK, axis=-1).astype(np.int64)
    bad_RS = ((sorted_RSLK[..., -1] >= config.experts) | (np.diff(sorted_RSLK, axis=-1) == 0).any(-1)).any(-1)
    if bad_RS.any():
        row, at = (int(x) for x in np.argwhere(bad_RS)[0])
        found = batch.routes_RSLK[row, at].tolist()
        raise DataError(f"row {row}, token {at}: routes {found} name an expert twice or one beyond {config.experts}")
