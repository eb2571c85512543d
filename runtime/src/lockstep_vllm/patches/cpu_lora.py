"""Adapters on linear layers on a CPU: one matrix product per adapter and batch, instead of one
gathered matrix per token.

vLLM 0.32 copies A and B for every token of a batch before it multiplies. A prompt of 500 tokens
moves some 50 MB for each projection of a small model, and most of a rollout's time goes there.
Where tokens of the base model share a batch with those of adapters, their index -1 selects the last
slot's adapter instead of none.

`tests/server/kernels/test_lora_cpu.py` compares with a product per token, and fails when vLLM's own
no longer needs this.

Shape suffixes: T tokens, I input features, O output features, R rank, L slots.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator

import torch

_LEAST_ROWS = 16


def shrink(
    x_TI: torch.Tensor, a_L1RI: torch.Tensor, y_TR: torch.Tensor, slots_T: torch.Tensor, scaling: float = 1.0
) -> None:
    """y = scaling * x A^T with each token's own A; zero for tokens without an adapter. In vLLM:
    `bgmv_shrink`.
    """
    x_TI = x_TI.to(y_TR.dtype)
    for slot, rows in _adapters(slots_T):
        if slot < 0:
            y_TR[rows] = 0
            continue
        a_RI = _matrix(a_L1RI, slot).to(y_TR.dtype)
        y_TR[rows, : a_RI.shape[0]] = scaling * _product(x_TI[rows], a_RI)


def expand(
    x_TR: torch.Tensor, b_L1OR: torch.Tensor, y_TO: torch.Tensor, slots_T: torch.Tensor, add_inputs: bool = True
) -> None:
    """y (+)= x B^T with each token's own B. In vLLM: `bgmv_expand`."""
    width = min(b_L1OR.shape[-2], y_TO.shape[-1])  # adapter and layer may pad their outputs differently
    expand_slice(x_TR, b_L1OR, y_TO, slots_T, 0, width, add_inputs)


def expand_slice(
    x_TR: torch.Tensor,
    b_L1OR: torch.Tensor,
    y_TO: torch.Tensor,
    slots_T: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """y[:, slice] (+)= x B^T with each token's own B. In vLLM: `bgmv_expand_slice`."""
    x_TR = x_TR.to(y_TO.dtype)
    columns = slice(slice_offset, slice_offset + slice_size)
    for slot, rows in _adapters(slots_T):
        if slot < 0:
            if not add_inputs:
                y_TO[rows, columns] = 0
            continue
        delta_TO = _product(x_TR[rows], _matrix(b_L1OR, slot)[:slice_size].to(y_TO.dtype))
        if add_inputs:
            y_TO[rows, columns] += delta_TO
        else:
            y_TO[rows, columns] = delta_TO


def _product(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T, each row with the same bits whatever the other rows are.

    The library has other kernels for fewer than 4 rows per thread, and their sums have another
    order. A token's log-probability would depend on its batch, and a resumed run would not repeat
    the undisturbed one.
    """
    rows = len(x_TI)
    if rows >= _LEAST_ROWS:
        return x_TI @ weight_OI.T
    return (torch.nn.functional.pad(x_TI, (0, 0, 0, _LEAST_ROWS - rows)) @ weight_OI.T)[:rows]


def _adapters(slots_T: torch.Tensor) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """Each slot that tokens of the batch use, and their rows; -1 stands for no adapter. Rollouts
    mostly use one.
    """
    first = int(slots_T[0])
    if bool((slots_T == first).all()):
        yield first, slice(0, len(slots_T))
        return
    for slot in slots_T.unique().tolist():
        yield slot, (slots_T == slot).nonzero()[:, 0]


def _matrix(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    matrix = stacked[slot]
    return matrix[0] if matrix.dim() == 3 else matrix


def apply() -> None:
    """Puts these in the place of vLLM's, in this process. For the CPU platform only."""
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    ours = {"bgmv_shrink": shrink, "bgmv_expand": expand, "bgmv_expand_slice": expand_slice}
    for module in (lora_ops, torch_ops, punica_cpu):  # vLLM's sgmv functions call those of lora_ops
        for name, function in ours.items():
            if not hasattr(module, name):
                raise RuntimeError(f"vLLM's {module.__name__} has no {name}: lockstep-vllm can't speed its adapters up")
            setattr(module, name, function)
