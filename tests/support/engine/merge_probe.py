"""Run by a Python that has Triton, under its interpreter: the merge's kernel against its plain form. Prints JSON."""

import json
import random
import sys

import torch

from lockstep.engine.export.merge import fused_merge, merge

DTYPES = (torch.float32, torch.bfloat16)
seed = int(sys.argv[1])
drawn, generator = random.Random(seed), torch.Generator().manual_seed(seed)
differences = []
for case in range(8):
    stack = () if case % 2 else (drawn.randint(1, 3),)
    rows, columns, rank = drawn.randint(1, 150), drawn.randint(1, 300), drawn.choice([1, 8, 16, 33])
    shapes = ((*stack, rows, columns), (*stack, rows, rank), (*stack, rank, columns))
    weight, b, a = (torch.randn(shape, generator=generator) for shape in shapes)
    weight, b, a = weight.to(DTYPES[case % 3 == 0]), b.to(DTYPES[case % 4 == 0]), a.transpose(-1, -2).contiguous()
    a = a.transpose(-1, -2)
    fused, other = fused_merge(weight, b, a, 1.5), merge(weight, b, a, 1.5)
    # Rounding goes by the size of what is summed.
    sizes = weight.double().abs() + 1.5 * b.double().abs() @ a.double().abs()
    units = (fused.double() - other.double()).abs() / (sizes * torch.finfo(weight.dtype).eps)
    differences.append([str(weight.dtype), float(units.max()), float((fused - weight).float().abs().mean())])
sys.stdout.write("RESULT " + json.dumps(differences) + "\n")
