"""Run by the server's own Python under Triton's interpreter: the digest's kernel against its plain form. Prints JSON."""

import json
import sys

import torch

from lockstep_wire.digest import digest, fused_sum

digests = []
for words, first, seed in [(1, 0, 0), (5000, 0, 3), (4096, 0, 1), (8191, 0, 4_000)]:
    bytes_N = torch.randint(0, 256, (8 * words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(words))
    total = torch.zeros(1, dtype=torch.int64)
    half = words // 2
    fused_sum(bytes_N[: 8 * half].view(torch.int64), first, seed, total)
    fused_sum(bytes_N[8 * half :].view(torch.int64), first + half, seed, total)
    digests.append([f"{int(total) & (1 << 64) - 1:016x}", digest(bytes_N, seed)])
sys.stdout.write("RESULT " + json.dumps(digests) + "\n")
