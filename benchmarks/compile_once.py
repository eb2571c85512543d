"""FlexAttention compiled once for all row lengths, against a version for each: seconds to compile, time, equal bits.

    python benchmarks/compile_once.py                # on a GPU
    python benchmarks/compile_once.py --tiny         # on a CPU: forward only, since FlexAttention has no backward there

Shapes: S row length, N query heads, G key heads, D head dim.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.engine.parallel import device  # isort: skip  (first: prepares torch for Megatron)
from lockstep.engine.layers import attention, compiled_ops
from lockstep.engine.rows.packed_row import Nodes, PackedRow

SHAPES = {"qwen3-8b": (32, 8, 128), "smollm2-135m": (9, 3, 64)}
GROUPS = ((1152, 128, 16, 64), (10_240, 2048, 1024, 8), (4096, 1024, 380, 8), (20_480, 4096, 2048, 8), (256, 20, 10, 8))
"""Row length, tokens of the prompt, tokens of each reply, replies."""


def group_row(length: int, prompt: int, reply: int, replies: int) -> PackedRow:
    """A row with one group: replies that share a prompt, padding after them."""
    edges = [0, *range(prompt, prompt + replies * reply + 1, reply)]
    start, stop, parent = edges[:-1], edges[1:], [-1] + [0] * replies
    if stop[-1] < length:
        start, stop, parent = [*start, stop[-1]], [*stop, length], [*parent, -1]
    nodes = Nodes(np.array(start), np.array(stop), np.array(parent))
    local_S = np.repeat(np.arange(len(start)), np.array(stop) - np.array(start))
    enter_S, leave_S = (torch.from_numpy(x_M[local_S]).to(device.device()) for x_M in nodes.intervals_M)
    zeros_S = torch.zeros(length, dtype=torch.long, device=device.device())
    return PackedRow(zeros_S, zeros_S, zeros_S - 1, enter_S, leave_S, nodes, 0)


def synchronise() -> None:
    if device.CUDA:
        torch.cuda.synchronize()


def timed(function: Callable[[], object], repeat: int) -> float:
    seconds = []
    for _ in range(repeat):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(
    attend: Callable[..., Tensor], row: PackedRow, heads: tuple[int, int, int], repeat: int
) -> tuple[list[Tensor], Any]:
    """(output and gradients, figures) of one row length."""
    queries, keys, dim = heads
    torch.manual_seed(row.length)
    dtype = torch.bfloat16 if device.CUDA else torch.float32
    inputs = [torch.randn(row.length, n, dim, dtype=dtype, device=device.device()) for n in (queries, keys, keys)]
    slope = torch.randn_like(inputs[0])
    if device.CUDA:
        inputs = [x.requires_grad_() for x in inputs]

    def run() -> list[Tensor]:
        q, k, v = (x.transpose(0, 1)[None] for x in inputs)
        out = attend(q, k, v, row, dim**-0.5)[0].transpose(0, 1)
        return [out.detach(), *(torch.autograd.grad(out, inputs, slope) if device.CUDA else ())]

    before = compiled_ops.compile_clock().compiled
    results = run()
    synchronise()
    after = compiled_ops.compile_clock().compiled
    figures = {"compilations": after.count - before.count, "seconds_compile": after.seconds - before.seconds}
    return results, figures | {"milliseconds": 1e3 * timed(run, repeat)}


def per_length(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float) -> Tensor:
    """A version of FlexAttention for each row length."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return compiled(q, k, v, block_mask=row.block_mask(), scale=scale, enable_gqa=True)  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="three short rows")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    cases = ((384, 100, 30, 4), (256, 20, 10, 8), (512, 100, 100, 4)) if options.tiny else GROUPS
    report: dict[str, Any] = {}
    for shape, heads in ({"tiny": (4, 2, 16)} if options.tiny else SHAPES).items():
        for length, *group in cases:
            row, results = group_row(length, *group), {}
            compiled_ops.enable(())  # torch's limits on versions
            for name, attend in (("per_length", per_length), ("once", attention.flex)):
                results[name], figures = measure(attend, row, heads, options.repeat)
                report.setdefault(shape, {}).setdefault(name, {})[length] = figures
                print(f"{shape:13} {name:11} {length:6} {json.dumps(figures)}", flush=True)
            equal = all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
            report[shape]["once"][length]["equal_bits"] = equal
    if options.output:
        options.output.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
