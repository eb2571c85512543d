"""What the way between two processes gives at most: one large tensor, sent again and again, nothing else.

python link.py RANK PORT DEVICE BYTES REPEAT     # ranks 0 and 1; rank 0 prints seconds and GB/s of the median as JSON
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


def main() -> None:
    rank, port, device, size, repeat = (
        int(sys.argv[1]),
        int(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]),
    )
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_device(torch.device(device))
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    bytes_N = torch.zeros(size, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(repeat + 2):
        flag = torch.zeros(1, device=device)
        dist.all_reduce(flag)
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        dist.broadcast(bytes_N, 0)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        median = statistics.median(seconds[2:])
        print(json.dumps({"seconds": median, "gb_per_s": size / median / 1e9, "bytes": size}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
