"""Compiled regions compute what the plain ones do, with gradients; and a region that doesn't exist is refused."""

from __future__ import annotations

import shutil

import pytest
import torch

from lockstep.engine.layers import compiled_ops
from lockstep.errors import ConfigError

pytestmark = pytest.mark.usefixtures("groups")


@pytest.mark.skipif(
    shutil.which("g++") is None and not torch.cuda.is_available(), reason="torch.compile needs a compiler"
)
@pytest.mark.parametrize(
    "name",
    [
        "rms_norm",
        "rotate",
        # Of the same two regions; `gated_silu` is compiled below.
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gated_rms_norm", "sigmoid_gate", "gated_silu")),
    ],
)
def test_compiled_is_plain(name: str) -> None:
    cases = {
        "rms_norm": (compiled_ops.rms_norm, (torch.randn(5, 1, 16), torch.randn(16)), (1e-6, True)),
        "gated_rms_norm": (
            compiled_ops.gated_rms_norm,
            (torch.randn(5, 3, 16), torch.randn(16), torch.randn(5, 3, 16)),
            (1e-6,),
        ),
        "rotate": (compiled_ops.rotate, (torch.randn(5, 3, 16),), (torch.randn(5, 1, 8), torch.randn(5, 1, 8))),
        "sigmoid_gate": (compiled_ops.sigmoid_gate, (torch.randn(5, 3, 16), torch.randn(5, 3, 16)), ()),
        "gated_silu": (compiled_ops.gated_silu, (torch.randn(5, 1, 16),), ()),
    }
    function, tensors, rest = cases[name]
    inputs = [t.requires_grad_() for t in tensors]
    results = []
    for chosen in ((), ("norm", "attention", "mlp")):
        compiled_ops.enable(chosen)
        try:
            out = function(*inputs, *rest)
            results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
        finally:
            compiled_ops.enable(())
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    shutil.which("g++") is None and not torch.cuda.is_available(), reason="torch.compile needs a compiler"
)
def test_all_lengths_share_one_version() -> None:
    """Several row lengths in turn, forward and backward, trained and scored: equal to plain code, compiled once each."""
    torch._dynamo.reset()
    clock, compiled = compiled_ops.compile_clock(), []
    for length in (24, 40, 24, 16, 57, 72, 40):
        # 16 is also the width: a dim that is equal by chance must not bind the two.
        gate_up = torch.randn(length, 1, 16, requires_grad=True)
        results = []
        for chosen in ((), ("mlp",)):
            compiled_ops.enable(chosen)
            try:
                out = compiled_ops.gated_silu(gate_up)
                with torch.no_grad():
                    scored = compiled_ops.gated_silu(gate_up)
                results.append((out, scored, *torch.autograd.grad(out.sin().sum(), gate_up)))
            finally:
                compiled_ops.enable(())
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        compiled.append(clock.compiled)
    assert compiled[0].count > 0
    assert compiled[0].seconds > 0
    assert [after.count for after in compiled] == [compiled[0].count] * len(compiled)


def test_unknown_region() -> None:
    with pytest.raises(ConfigError, match="kitchen"):
        compiled_ops.enable(["norm", "kitchen"])
