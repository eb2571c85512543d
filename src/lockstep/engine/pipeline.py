"""Rows through pipeline stages: one forward one backward (1F1B, arXiv 2104.04473), or forward only.

With one stage this is a plain loop. Activations and their gradients travel point to point; every
rank knows every row's length, so nothing but the tensors is sent. Warm-up: a stage runs as many
rows ahead as there are stages after it. So it never waits in steady state and holds at most that
many rows' activations.

Shapes: S tokens of this rank's shard of a row, H hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.engine.model import Model
from lockstep.engine.parallel import groups
from lockstep.engine.parallel.device import device
from lockstep.engine.parallel.progress import progress
from lockstep.engine.rows.packed_row import PackedRow

LastStage = Callable[[int, Tensor], Tensor]
"""(number of the row in the list, hidden states) -> the scalar to differentiate. Called on the last
stage only.
"""


class _Links:
    """Point-to-point transfers with the neighbouring stages. The sends and receives of one moment
    go out together: none can block another.

    Row numbers say what is sent: `take`/`give` a row's activations (from the stage before, to the
    stage after) or their gradient.
    """

    def __init__(self, model: Model, rows: Sequence[PackedRow], shard: int) -> None:
        self.model, self.rows, self.shard = model, rows, shard
        self.group = groups.pipeline()
        self.first, self.last = model.pre_process, model.post_process

    def _empty(self, number: int) -> Tensor:
        config = self.model.config
        shape = (self.rows[number].length // self.shard, 1, config.hidden_size)
        return torch.empty(shape, dtype=config.params_dtype, device=device())

    def swap(self, peer: int, give: Tensor | None, take: int | None) -> Tensor | None:
        """Send `give` to a stage and receive row `take`'s tensor from it, either may be None."""
        ops = [] if give is None else [dist.P2POp(dist.isend, give.contiguous(), peer, group=self.group)]
        taken = None if take is None else self._empty(take)
        if taken is not None:
            ops.append(dist.P2POp(dist.irecv, taken, peer, group=self.group))
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        return taken

    def before(self, give: Tensor | None = None, take: int | None = None) -> Tensor | None:
        """Give a gradient to the stage before, take activations from it."""
        return None if self.first else self.swap(groups.previous_stage(), give, take)

    def after(self, give: Tensor | None = None, take: int | None = None) -> Tensor | None:
        """Give activations to the stage after, take a gradient from it."""
        return None if self.last else self.swap(groups.next_stage(), give, take)


def forward_only(model: Model, rows: Sequence[PackedRow], last: Callable[[int, Tensor], None], shard: int = 1) -> None:
    """Run every row without gradients; `last` sees each one's hidden states on the last stage.

    shard: parts a row's tokens are split in.
    """
    links = _Links(model, rows, shard)
    with torch.no_grad():
        for number, row in enumerate(rows):
            hidden = model.forward_row(row, links.before(take=number))
            progress.count += 1
            if model.post_process:
                last(number, hidden)
            else:
                links.after(give=hidden)


def forward_backward(model: Model, rows: Sequence[PackedRow], last: LastStage, shard: int = 1) -> None:
    """Run every row forward and backward; gradients accumulate in the parameters. `last` returns
    the loss to differentiate.
    """
    links = _Links(model, rows, shard)
    ahead = min(links.group.size() - 1 - links.group.rank(), len(rows))
    in_flight: deque[tuple[Tensor | None, Tensor]] = deque()

    def forward(number: int, received: Tensor | None) -> Tensor:
        if received is not None:
            received.requires_grad_(True)
        hidden = model.forward_row(rows[number], received)
        out = last(number, hidden) if model.post_process else hidden
        in_flight.append((received, out))
        progress.count += 1
        return out.detach()

    for number in range(ahead):
        links.after(give=forward(number, links.before(take=number)))
    received = links.before(take=ahead) if ahead < len(rows) else None
    for number in range(ahead, len(rows)):
        out = forward(number, received)
        passed = _backward(in_flight.popleft(), links.after(give=out, take=number - ahead))
        received = links.before(give=passed, take=number + 1 if number + 1 < len(rows) else None)
    for number in range(len(rows) - ahead, len(rows)):
        links.before(give=_backward(in_flight.popleft(), links.after(take=number)))


def _backward(step: tuple[Tensor | None, Tensor], gradient: Tensor | None) -> Tensor | None:
    """Differentiate one row's stage; the gradient of what it received."""
    received, out = step
    if out.requires_grad:
        torch.autograd.backward(out, gradient)
    progress.count += 1
    if received is None:
        return None
    return received.grad if received.grad is not None else torch.zeros_like(received)
