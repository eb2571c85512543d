"""`merge.py` as one Triton kernel; imported on a GPU only, where every torch brings Triton."""

# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def merge_kernel(
    weight, b, a, merged, scale, rows, columns, rank, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr
):
    """One tile [ROWS, COLUMNS] of one expert's merged weight. All tensors are contiguous: weight
    and merged [E, rows, columns], b [E, rows, rank], a [E, rank, columns].

    RANKS: of A and B at a time.
    """
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside_row, inside_column = row < rows, column < columns
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANKS):
        r = start + tl.arange(0, RANKS)
        b_at = b + (expert * rows + row)[:, None] * rank + r[None, :]
        a_at = a + (expert * rank + r)[:, None] * columns + column[None, :]
        b_tile = tl.load(b_at, mask=inside_row[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
        a_tile = tl.load(a_at, mask=(r < rank)[:, None] & inside_column[None, :], other=0.0).to(tl.float32)
        product = tl.dot(b_tile, a_tile, product, input_precision="ieee")
    place = (expert * rows + row)[:, None] * columns + column[None, :]
    inside = inside_row[:, None] & inside_column[None, :]
    base = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(merged + place, (base + scale * product).to(merged.dtype.element_ty), mask=inside)
