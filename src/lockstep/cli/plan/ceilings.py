"""The measured limits and shares that a plan multiplies its counted work with.

Each figure names its measurement. `tests/unit/cli/plan` holds the plan to every shape in
`benchmarks/results/`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A kind of GPU.

    memory: bytes.
    flops: of a bf16 matrix product, per second.
    link: bytes per second one way between two GPUs of a host.
    per_host: GPUs of a host.
    """

    name: str
    memory: int
    flops: float
    link: float
    per_host: int


DEVICES = {"h200": Device("NVIDIA H200", 150_109_880_320, 788e12, 370e9, 8)}
"""docs/architecture.md, section 7; the memory is what the driver says (h200_shared_mode_qwen3_8b.json)."""

USED_FLOPS = 0.49
"""Share of `flops` that a training step uses. h200_packing_qwen3_8b.json: 0.38 to 0.57 in fifteen
cases.
"""
LAUNCH_S = 4.5e-3
"""Seconds of one layer and one row below which kernels wait for their launch, and arithmetic says
nothing of the time. h200_parity_bf16.json: 5 to 20 ms a layer, for 0.2 ms of arithmetic.
"""
KEPT_STREAM, KEPT_ATTENTION, KEPT_LINEAR, KEPT_EXPERTS = 0.97, 0.11, 0.515, 1.0
"""Activations that a step keeps: these shares of the residual stream and MLP, of attention, of
GatedDeltaNet and of routed experts as `models.activations` counts them.
h200_packing_qwen3_8b.json, and the rows of one GPU in h200_parity_bf16.json.
"""
LOGITS_BYTES = 7200
"""Of the loss's chunk, per entry of the vocabulary. h200_packing_qwen3_8b.json: 1.1 GB for 151,936."""
LOGITS_CHUNK = 1 << 28
"""Bytes of a chunk of logits, as `engine.layers.lm_head` has it."""
TRAINED_BYTES = 18
"""Of a trained element: bf16 weight, fp32 gradient, fp32 master and two fp32 moments."""
SYNC_S = 0.05
"""Of a merged sync, beside the bytes over the link: pause, swap and digests.
h200_weight_sync_qwen3_8b_tp1_to_tp1.json and h200_weight_sync_qwen3_30b_a3b_tp1_to_tp1.json.
"""
ADAPTER_SYNC_S = 0.016
"""The same of an adapter. h200_adapter_sync_qwen3_8b_qwen3_30b_a3b.json."""
CONTEXT_BYTES = 3 << 30
"""Of a trainer's GPU, outside of its tensors. h200_shared_mode_qwen3_8b.json: 2.6 to 3.5 GiB beside them."""
SERVED = 0.9
"""Share of a server's GPU that it takes by default."""
