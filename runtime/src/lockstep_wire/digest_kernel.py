"""The digest of `digest.py` as one Triton kernel; imported on a GPU only, where every torch brings
Triton.
"""

# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "first", "seed"])
def digest_kernel(words, total, count, first, seed, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Adds words [0, count) times their weights to total[0]; `first` is the position of words[0] in
    its bucket.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + index, mask=index < count, other=0)
    mixed = (index + first + 1 + (seed.to(tl.int64) << 32)) * STEP
    weight = ((mixed ^ (mixed >> 29)) * STEP) | 1
    tl.atomic_add(total, tl.sum(word * weight, 0))
