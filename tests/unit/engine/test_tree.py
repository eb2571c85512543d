"""The mask rule: numbering, dense mask, block mask and FlexAttention against a plain walk up the tree."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.layers.attention import attend
from lockstep.engine.rows.packed_row import BLOCK, Nodes, PackedRow, block_counts_BB, build_block_mask, padded_length


def random_row(seed: int, nodes: int, longest: int) -> PackedRow:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, nodes)
    stop = np.cumsum(lengths)
    parent = np.array([int(rng.integers(-1, node)) for node in range(nodes)])
    made = Nodes(stop - lengths, stop, parent)
    enter, leave = made.intervals_M
    local = np.repeat(np.arange(nodes), lengths)
    first = stop - lengths
    previous = np.arange(stop[-1]) - 1
    for node in range(nodes):
        previous[first[node]] = stop[parent[node]] - 1 if parent[node] >= 0 else -1
    put = torch.from_numpy
    length = int(stop[-1])
    zeros = torch.zeros(length, dtype=torch.long)
    return PackedRow(zeros, zeros, put(previous), put(enter[local]), put(leave[local]), made, 0)


def by_walking(row: PackedRow) -> np.ndarray:
    nodes, local = row.nodes, np.repeat(np.arange(len(row.nodes.start_M)), row.nodes.stop_M - row.nodes.start_M)
    seen = np.zeros((row.length, row.length), bool)
    for query in range(row.length):
        path, node = set(), int(local[query])
        while node >= 0:
            path.add(node)
            node = int(nodes.parent_M[node])
        for key in range(query + 1):
            seen[query, key] = int(local[key]) in path
    return seen


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), nodes=st.integers(1, 12), longest=st.integers(1, 9))
def test_dense_mask(seed: int, nodes: int, longest: int) -> None:
    row = random_row(seed, nodes, longest)
    assert np.array_equal(row.dense_mask_SS().numpy(), by_walking(row))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), nodes=st.integers(1, 30), longest=st.integers(1, 90))
def test_block_mask(seed: int, nodes: int, longest: int) -> None:
    row = random_row(seed, nodes, longest)
    dense = row.dense_mask_SS().numpy()
    mask = build_block_mask(row.nodes, row.enter_S, row.leave_S)
    blocks = len(block_counts_BB(row.nodes))
    covered = np.zeros((blocks, blocks), int)
    for kind, counts, indices in (
        (1, mask.kv_num_blocks, mask.kv_indices),
        (2, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for query in range(blocks):
            for key in indices[0, 0, query, : int(counts[0, 0, query])].tolist():
                assert covered[query, key] == 0
                covered[query, key] = kind
    for query in range(blocks):
        for key in range(blocks):
            tile = dense[query * BLOCK : (query + 1) * BLOCK, key * BLOCK : (key + 1) * BLOCK]
            assert covered[query, key] == 2 or not (covered[query, key] == 0 and tile.any())
            assert covered[query, key] != 2 or tile.all()
            if query != key:  # below the diagonal the classes are exact
                assert covered[query, key] == (2 if tile.all() else 1 if tile.any() else 0)


@given(used=st.integers(0, 300_000), unit=st.sampled_from([1, 2, 6, 128, 256, 384]))
def test_padded_length(used: int, unit: int) -> None:
    length = padded_length(used, unit)
    assert length % unit == 0
    assert length >= max(used, 2 * unit)
    assert length == 2 * unit or length - used < unit


def test_conv_taps_follow_the_path() -> None:
    row = random_row(3, 9, 4)
    taps = row.conv_taps_KS(4)
    for token in range(row.length):
        ancestor, expected = token, []
        for _ in range(4):
            expected.append(ancestor if ancestor >= 0 else row.length)
            ancestor = int(row.previous_S[ancestor]) if ancestor >= 0 else -1
        assert taps[:, token].tolist() == expected


def test_renderings_agree() -> None:
    """dense = SDPA forward and backward; FlexAttention (no backward pass on CPU) forward."""
    torch.manual_seed(0)
    row = random_row(5, 10, 30)
    q, k, v = (torch.randn(row.length, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    outputs = {kind: attend(q, k, v, row, 0.25, kind) for kind in ("dense", "sdpa")}
    slope = torch.randn_like(outputs["dense"])
    gradients = {kind: torch.autograd.grad((out * slope).sum(), (q, k, v)) for kind, out in outputs.items()}
    torch.testing.assert_close(outputs["sdpa"], outputs["dense"], rtol=1e-5, atol=2e-6)
    for a, b in zip(gradients["sdpa"], gradients["dense"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    from torch.nn.attention.flex_attention import flex_attention

    with torch.no_grad():
        heads_first = (x.detach().transpose(0, 1)[None] for x in (q, k, v))
        flex = flex_attention(*heads_first, block_mask=row.block_mask(), scale=0.25, enable_gqa=True)[0].transpose(0, 1)  # pyright: ignore
    torch.testing.assert_close(flex, outputs["dense"], rtol=1e-5, atol=2e-6)
