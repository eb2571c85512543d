"""Routed experts of a batch, checked before any layer replays them (`router.py`), since Megatron
uses replayed numbers unchecked. An account then shows that every record was used exactly once, at
its own token and layer.

The account is a sum modulo 2^64. Each record is multiplied with a pseudo-random number of its row,
token, layer and position in the top K. The sum over the routers of all ranks must equal the sum
over the rows. A record that is left out, used twice, or used elsewhere changes the sum.

Shapes: R rows, S row length, T tokens of this rank, L mixture-of-experts layers, K experts per
token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.batching.packed_batch import PackedBatch
from lockstep.errors import DataError
from lockstep.models.config import ModelConfig

if TYPE_CHECKING:
    from lockstep.engine.rows.packed_row import PackedRow

_ODD, _OTHER_ODD = -7046029254386353131, -4658895280553007687
"""2^64 over the golden ratio, and a multiplier of the splitmix64 generator, as signed numbers."""
_LAYERS = 1 << 40
"""Row numbers and layer numbers draw from different ranges."""

recomputing: ContextVar[bool] = ContextVar("lockstep_recomputing", default=False)
"""True while activations are computed a second time for the backward pass: nothing is counted then.
"""


@contextmanager
def recompute_pass() -> Iterator[None]:
    """Around the second computation of a layer."""
    token = recomputing.set(True)
    try:
        yield
    finally:
        recomputing.reset(token)


def mixed(numbers: Tensor) -> Tensor:
    """A pseudo-random int64 for each int64, modulo 2^64."""
    product = (numbers + 1) * _ODD
    return (product ^ (product >> 29)) * _OTHER_ODD


def record_keys(row: int, length: int, device: torch.device) -> Tensor:
    """int64 `[length]`: a number for each token of row `row` of the batch (-1: a row of padding)."""
    return mixed(torch.arange(length, device=device) + (row + 1) * (1 << 24))


@cache
def _layer_keys(layers: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 `[L]`: a number for each of these mixture-of-experts layers, counted over the whole
    model.
    """
    return mixed(torch.tensor(layers, device=device) + _LAYERS)


@cache
def _place_keys(topk: int, device: torch.device) -> Tensor:
    """int64 `[K]`: a number for each place in the top K."""
    return mixed(torch.arange(topk, device=device))


def account(experts_TK: Tensor, keys_T: Tensor) -> Tensor:
    """int64 scalar: these records' part of the sum.

    keys_T: their token's times their layer's. `[..., K]` and `[...]` do as well.
    """
    places_K = _place_keys(experts_TK.shape[-1], experts_TK.device)
    return (((experts_TK + 1) * places_K).sum(-1) * keys_T).sum()


def account_of_row(experts_SLK: Tensor, row: int) -> Tensor:
    """int64 scalar: the sum over all of a row's records."""
    keys_S = record_keys(row, len(experts_SLK), experts_SLK.device)
    layers_L = _layer_keys(tuple(range(experts_SLK.shape[1])), experts_SLK.device)
    return account(experts_SLK.long(), keys_S[:, None] * layers_L)


class Replay(NamedTuple):
    """The replay of one layer, for its share of a row's records. The last two are alike in all
    layers of a row.
    """

    layer: int
    experts_TK: Tensor
    """The experts that it used."""
    own_TK: Tensor
    """Those that its router would have picked."""
    counted_T: Tensor
    """bool: tokens whose choices matter."""
    keys_T: Tensor
    """int64: what the tokens' records are accounted with."""


class Replayed:
    """Sums over all records that a stage's routers have used since it was last cleared."""

    def __init__(self, device: torch.device) -> None:
        self.used = torch.zeros((), dtype=torch.int64, device=device)
        """The account."""
        self.choices = torch.zeros(2, dtype=torch.int64, device=device)
        """Choices that the routers would not have made, and all choices."""

    def clear(self) -> None:
        self.used.zero_()
        self.choices.zero_()

    @torch.no_grad()
    def add(self, layers: Sequence[Replay]) -> None:
        """One row's, all layers in one go: layer by layer these few sums would be a percent of a
        training step.
        """
        if not layers:
            return
        counted_T, keys_T = layers[0].counted_T, layers[0].keys_T
        experts_LTK = torch.stack([layer.experts_TK for layer in layers])
        own_LTK = torch.stack([layer.own_TK for layer in layers])
        differs_LTK = (experts_LTK[..., None] != own_LTK[..., None, :]).all(-1)
        compared = counted_T.sum() * (len(layers) * experts_LTK.shape[-1])
        self.choices += torch.stack([(differs_LTK & counted_T[:, None]).sum(), compared])
        keys_L = _layer_keys(tuple(layer.layer for layer in layers), keys_T.device)
        self.used += account(experts_LTK, keys_L[:, None] * keys_T)


def check_routed_experts(batch: PackedBatch, rows: Sequence[PackedRow], config: ModelConfig) -> None:
    """Raise DataError, on every rank, unless the batch's routed experts fit the model: layers,
    experts per token, range, no expert twice.

    rows: this rank's, whose routed experts are on the device already: there looking at each of them
        takes no time.
    """
    if batch.experts_RSLK is None:
        return
    if not config.is_moe:
        raise DataError(
            "the batch has routed experts but the model has no experts; the rollouts belong to another model"
        )
    expected = (sum(config.moe_layers), config.experts_per_token)
    if batch.experts_RSLK.shape[2:] != expected:
        raise DataError(
            f"routed experts are for {batch.experts_RSLK.shape[2]} layers with {batch.experts_RSLK.shape[3]} experts per token, "
            f"the model has {expected[0]} with {expected[1]}; the rollouts belong to another model"
        )
    nowhere = batch.tokens_RS.size
    invalid = []
    for row in rows:
        assert row.experts_SLK is not None
        token = first_invalid(row.experts_SLK, config.experts)
        invalid.append(torch.where(token < row.length, token + row.index * batch.row_length, nowhere))
    first = torch.stack(invalid).min()
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if int(first) < nowhere:
        row, token = divmod(int(first), batch.row_length)
        routed_experts = batch.experts_RSLK[row, token].tolist()
        raise DataError(
            f"row {row}, token {token}: routed experts {routed_experts} name an expert twice or one beyond {config.experts}"
        )


def first_invalid(experts_SLK: Tensor, experts: int) -> Tensor:
    """int64 scalar: the first token with an unknown expert, or with one expert twice in a layer; S
    if there is none.
    """
    invalid_SL = experts_SLK.amax(-1).int() >= experts  # a narrow type may not hold `experts`
    for shift in range(1, experts_SLK.shape[-1] // 2 + 1):  # round the circle of places, each meets every other one
        invalid_SL |= (experts_SLK == experts_SLK.roll(shift, -1)).any(-1)
    invalid_S = invalid_SL.any(-1)
    return torch.cat([invalid_S, invalid_S.new_ones(1)]).int().argmax()
