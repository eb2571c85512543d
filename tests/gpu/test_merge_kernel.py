"""The merge's kernel on a GPU rounds once, as torch does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.export.merge import fused_merge

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(1, 4),
    rows=st.integers(1, 700),
    columns=st.integers(1, 900),
    rank=st.sampled_from([1, 8, 16, 48, 128]),
    seed=st.integers(0, 1000),
)
def test_rounds_once(experts: int, rows: int, columns: int, rank: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    weight, b, a = drawn(experts, rows, columns), drawn(experts, rows, rank), drawn(experts, rank, columns)
    exact = weight.double() + 1.5 * b.double() @ a.double()
    merged = fused_merge(weight, b, a, 1.5)
    unit = exact.abs() * torch.finfo(torch.bfloat16).eps / 2
    slack = (weight.double().abs() + 1.5 * b.double().abs() @ a.double().abs()) * rank * torch.finfo(torch.float32).eps
    assert bool(((merged.double() - exact).abs() <= unit + slack).all())
    assert float((merged == exact.to(torch.bfloat16)).float().mean()) > 0.98
