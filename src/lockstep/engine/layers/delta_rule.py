"""The gated delta rule over packed trees: every node starts from its parent's final state; siblings
run side by side.

    S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - (e^{g_t} S_{t-1})^T k_t))^T,     o_t = S_t^T q_t / sqrt(K)

Source: arXiv 2412.06464; the chunked form is its section 3.3 (WY representation). Two renderings:
`chunked` here in plain torch (the reference, and what CPUs run), and flash-linear-attention's
kernels on GPU. Tokens are visited level by level of the tree, so depth costs sequential launches
but breadth does not.

Shapes: S tokens of the row, N nodes of a level, L longest of them, T tokens of a level, M nodes of
the row, H heads, K key dim, V value dim, C chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lockstep.engine.layers.compiled_ops import wide
from lockstep.engine.rows.packed_row import Level, PackedRow

CHUNK = 64

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k `[..., H, K]`, v `[..., H, V]`, g, beta `[..., H]`; q and k already normalised."""

LevelRule = Callable[[Inputs, Level, Tensor], tuple[Tensor, Tensor]]
"""(row's inputs, level, initial states `[N, H, K, V]`) -> (outputs of the level's tokens `[T, H,
V]` in row order, final states).
"""


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`[N, L, H, ...]` and states `[N, H, K, V]` -> outputs `[N, L, H, V]` and final states.
    Computed in at least fp32.

    A padding token with g = 0 and beta = 0 leaves the state as it is.
    """
    length = q.shape[1]
    chunk = min(chunk, length)
    q, k, v, g, beta = (wide(x).movedim(1, 2) for x in (q, k, v, g, beta))
    q = q * q.shape[-1] ** -0.5
    pad = -length % chunk
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        g, beta = (F.pad(x, (0, pad)) for x in (g, beta))
    q, k, v, g, beta = (x.unflatten(2, (-1, chunk)) for x in (q, k, v, g, beta))
    decay = g.cumsum(-1)
    order = torch.arange(chunk, device=q.device)
    lower = order[:, None] >= order
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    weighted = k * beta[..., None]
    system = (weighted @ k.mT) * between  # the solver takes its strict lower part, with ones on the diagonal
    u = torch.linalg.solve_triangular(system, v * beta[..., None], upper=False, unitriangular=True)
    w = torch.linalg.solve_triangular(system, weighted * decay.exp()[..., None], upper=False, unitriangular=True)
    inner = (q @ k.mT) * between
    q_in, k_out = q * decay.exp()[..., None], k * (decay[..., -1:] - decay).exp()[..., None]
    last = decay[..., -1].exp()[..., None, None]
    outputs = []
    for n in range(q.shape[2]):
        fresh = u[:, :, n] - w[:, :, n] @ state
        outputs.append(q_in[:, :, n] @ state + inner[:, :, n] @ fresh)
        state = state * last[:, :, n] + k_out[:, :, n].mT @ fresh
    return torch.cat(outputs, 2)[:, :, :length].movedim(2, 1), state


def _level_chunked(inputs: Inputs, level: Level, state: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes padded to the longest of the level; the padding index points at a row of zeros behind
    the tokens.
    """
    padded = (torch.cat((x, x.new_zeros(1, *x.shape[1:])))[level.tokens_NL] for x in inputs)
    out_NLHV, final = chunked(*padded, state)  # pyright: ignore[reportCallIssue]
    inside_NL = level.tokens_NL < inputs[0].shape[0]
    return out_NLHV[inside_NL], final


def _level_fla(inputs: Inputs, level: Level, state: Tensor) -> tuple[Tensor, Tensor]:
    """flash-linear-attention over the level's nodes laid end to end."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    q, k, v, g, beta = (x[level.flat_T][None].contiguous() for x in inputs)
    out, final = chunk_gated_delta_rule(
        q, k, v, wide(g), beta, initial_state=state, output_final_state=True, cu_seqlens=level.cu_seqlens
    )
    return out[0], final


def over_tree(inputs: Inputs, row: PackedRow, rule: LevelRule) -> Tensor:
    """Outputs `[S, H, V]` of all tokens in row order. Roots start from zero states."""
    q, _, v = inputs[:3]
    roots = torch.zeros(
        1, q.shape[1], q.shape[2], v.shape[2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
    )
    outputs, positions, finals = [], [], []
    where = torch.zeros(len(row.nodes.start_M) + 1, dtype=torch.long, device=q.device)
    count = 1
    for level in row.levels():
        known = torch.cat([roots, *finals])
        out_TH, final = rule(
            inputs, level, known[where[level.parent_N]]
        )  # parent -1 reads the last entry: the zero state
        where[level.nodes_N] = torch.arange(count, count + len(level.lengths), device=q.device)
        count += len(level.lengths)
        finals.append(final)
        outputs.append(out_TH)
        positions.append(level.flat_T)
    order_S = torch.cat(positions).argsort()
    return torch.cat(outputs)[order_S]


def rule_for(tensor: Tensor) -> LevelRule:
    """fla for bf16 on a GPU (a hard requirement there; its kernels refuse fp32), the reference
    elsewhere.
    """
    return _level_fla if tensor.is_cuda and tensor.dtype == torch.bfloat16 else _level_chunked
