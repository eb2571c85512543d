"""Two ranks of which one fails while the other waits inside a collective. Run by test_agreement.py under the trainer's launcher."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lockstep.config import deadlines
from lockstep.engine.parallel import coordination
from lockstep.engine.parallel.coordination import Agreement
from lockstep.engine.parallel.launch import group_settings


def main() -> None:
    case, out = sys.argv[1], Path(sys.argv[2])
    deadlines.LOST_RANK_S, coordination.POLL_S = 2.0, 0.1
    dist.init_process_group("gloo", **group_settings())
    agreed = Agreement()

    def give_up(why: str) -> None:
        (out / f"gave-up-{agreed.rank}").write_text(why)

    error = None
    with agreed.watched(1, 60.0, give_up):
        if case == "one fails" and agreed.rank == 1:
            error = {"type": "DataError", "message": "rank 1 met a bad row", "traceback": ""}
        elif case == "both fail":
            error = {"type": "DataError", "message": f"rank {agreed.rank} met a bad row", "traceback": ""}
        elif case != "fine":
            dist.all_reduce(torch.ones(1))  # never answered
    outcome = agreed.settle(1, error, 60.0)
    (out / f"settled-{agreed.rank}").write_text(outcome["message"] if outcome else "fine")
    dist.barrier() if case != "one fails" else None


if __name__ == "__main__":
    main()
