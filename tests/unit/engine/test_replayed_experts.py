"""Routed experts of a batch: what is refused before any layer replays them, and how they come to the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import tiny
from lockstep.engine.parallel import device  # noqa: F401 (first: prepares torch for Megatron)
from lockstep.engine.rows.packed_row import packed_row
from lockstep.engine.rows.routed_experts import account_of_row, check_routed_experts, first_invalid
from lockstep.errors import DataError
from lockstep.models.registry import load_model_config
from lockstep.validate.reference.batches import batch_of, tree_sequences


def test_routed_experts_of_another_model_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batch = batch_of(tree_sequences(rng), rng)
    config, dense = (load_model_config(tiny(family, tmp_path / family)) for family in ("qwen3_moe", "qwen3"))
    shape = (*batch.tokens_RS.shape, sum(config.moe_layers) - 1, config.experts_per_token)
    routed = replace(batch, experts_RSLK=np.broadcast_to(np.arange(shape[-1], dtype=np.uint8), shape))
    with pytest.raises(DataError, match="no experts"):
        check_routed_experts(routed, [], dense)
    with pytest.raises(DataError, match="layers"):
        check_routed_experts(routed, [], config)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.int32]))
def test_the_first_invalid_record_is_found(seed: int, dtype: type) -> None:
    """Against each record's own set of experts, one by one."""
    random = np.random.default_rng(seed)
    tokens, layers, topk, experts = (
        random.integers(1, 9),
        random.integers(1, 4),
        random.integers(1, 5),
        random.integers(5, 9),
    )
    experts_SLK = random.random((tokens, layers, experts)).argsort(-1)[..., :topk]
    for _ in range(random.integers(0, 3)):
        experts_SLK[random.integers(tokens), random.integers(layers), random.integers(topk)] = random.integers(
            experts + 2
        )
    records = (
        all(len({*experts_K}) == topk and max(experts_K) < experts for experts_K in experts_LK)
        for experts_LK in experts_SLK.tolist()
    )
    first = next((place for place, valid in enumerate(records) if not valid), tokens)
    assert int(first_invalid(torch.from_numpy(experts_SLK.astype(dtype)), int(experts))) == first


def test_routed_experts_come_to_the_device_as_they_are() -> None:
    """Narrow numbers beyond the signed ones too; padding tokens have different experts."""
    rng = np.random.default_rng(1)
    batch = batch_of(tree_sequences(rng), rng)
    for dtype, highest in ((np.uint8, 255), (np.uint16, 65535)):
        experts_RSLK = rng.integers(0, highest, (*batch.tokens_RS.shape, 2, 3), endpoint=True).astype(dtype)
        experts_RSLK[0, 0] = highest
        row = packed_row(replace(batch, experts_RSLK=experts_RSLK), 0, torch.device("cpu"), unit=64)
        used = int(np.flatnonzero(batch.nodes_RS[0] >= 0)[-1]) + 1
        assert row.experts_SLK is not None
        assert row.experts_SLK[:used].tolist() == experts_RSLK[0, :used].tolist()
        assert (row.experts_SLK[used:] == torch.arange(3)).all()
        assert len(row.experts_SLK) == row.length
        assert account_of_row(row.experts_SLK, 0) == account_of_row(row.experts_SLK.long(), 0)
    assert int(first_invalid(torch.tensor([[[255, 0]]], dtype=torch.uint8), 256)) == 1
