"""The trainer's adapter on its way to the server, from memory: every rank sends the matrices it
holds.

A routed expert's matrices travel stacked, as trainer and vLLM hold them. Each projection of a layer
has A `[E, R, I]` and B `[E, O, R]`, under the layer's name without an expert's number. Everything
else travels as in a PEFT file.

Shapes: R LoRA rank, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lockstep.engine.optim.trainable import Trainable
from lockstep.engine.parallel import device
from lockstep.engine.state import TrainerState
from lockstep.engine.weight_sync.plan import Part, Source, SyncPlan, plan_sources
from lockstep.engine.weight_sync.sender import AdapterPusher, Endpoint, Pushers
from lockstep.engine.weight_sync.sender_group import SenderGroup
from lockstep.engine.weight_sync.transports import make_transport
from lockstep.errors import ConfigError
from lockstep.models.checkpoint.peft import AdapterInfo, adapter_config, peft_name
from lockstep.models.checkpoint.shares import box
from lockstep.models.config import ModelConfig
from lockstep.models.contract import Layout, Piece
from lockstep.trainer.protocol import SyncReport
from lockstep_wire.plan import TensorMeta

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+\.lora_[AB])")
BUCKET_BYTES = {True: 64 << 20, False: 16 << 20}
"""On a GPU, else: few calls on the one, a short wait for the digest of the last bucket on the
other.
"""


class AdaptersOut:
    """Made once on every rank (collective) and kept: the plan and the connection serve every sync
    of a run.
    """

    def __init__(self, trainer: TrainerState, senders: SenderGroup, deadline_s: float) -> None:
        """deadline_s: for the others to come along.

        Raises ConfigError when all weights are trained: there is no adapter then.
        """
        if trainer.settings.lora is None:
            raise ConfigError("all weights are trained: there is no adapter to send")
        self.trainer, self.senders = trainer, senders
        config, layout = trainer.config, trainer.checkpoint.layout
        matrices = [_Matrix.of(trainable, config, layout) for trainable in trainer.trainables]
        gathered = senders.exchange([matrix.description() for matrix in matrices], deadline_s)
        shares = _share_out(gathered)
        dtype = trainer.dtype
        plans = [
            plan_sources([_source(gathered[rank][i], dtype) for i in chosen], BUCKET_BYTES[device.CUDA])
            for rank, chosen in enumerate(shares)
        ]
        self.plan = SyncPlan(tuple(plans))
        self.sent = [trainer.trainables[i] for i in shares[senders.rank]]
        self.pushers: Pushers[AdapterPusher] = Pushers()

    def push(
        self, endpoint: Endpoint, name: str, transport: str, deadline_s: float, others: Sequence[str] = ()
    ) -> SyncReport:
        """Make the server serve this trainer's adapter as `name`, beside what it serves.
        Collective. Returns the SyncReport.

        deadline_s: of every wait for the server.
        others: addresses of other servers, to which connections are kept.

        Raises like `AdapterPusher.push`, on every rank.
        """
        lora = self.trainer.settings.lora
        assert lora is not None

        def connected() -> AdapterPusher:
            info = AdapterInfo(self.trainer.settings.model, lora.rank, lora.alpha, lora.targets)
            carrier, config = make_transport(transport, deadline_s), adapter_config(info, self.trainer.config)
            return AdapterPusher(
                endpoint,
                carrier,
                self.plan,
                config,
                device=device.device(),
                deadline_s=deadline_s,
                senders=self.senders,
            )

        return self.pushers.to(endpoint, (transport, deadline_s), others, connected).push(self.tensors(), name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for trainable in self.sent:
            yield trainable.name, trainable.parameter.detach()


def adapter_source(trainable: Trainable, config: ModelConfig, layout: Layout, dtype: torch.dtype) -> Source:
    """The source of a rank that sends this parameter of its adapter."""
    return _source(_Matrix.of(trainable, config, layout).description(), dtype)


class _Matrix:
    """An adapter's parameter as parts of the tensors that travel."""

    def __init__(self, key: str, rows: int, width: int, parts: list[Any]) -> None:
        self.key, self.rows, self.width, self.parts = key, rows, width, parts

    def description(self) -> dict[str, Any]:
        """As JSON, for the other ranks."""
        return {"key": self.key, "rows": self.rows, "width": self.width, "parts": self.parts}

    @staticmethod
    def of(trainable: Trainable, config: ModelConfig, layout: Layout) -> _Matrix:
        parameter = trainable.parameter
        named = _joined(piece for piece in trainable.pieces if piece.name is not None)
        experts = [_EXPERT.fullmatch(piece.name or "") for piece in named]
        if not all(experts):
            parts, row = [], 0
            for piece in named:
                assert piece.name is not None
                shape = trainable.shapes[piece.name]
                parts.append([peft_name(piece.name, layout), shape, box(piece, shape), row, piece.rows])
                row += piece.rows
            return _Matrix(trainable.name, row, trainable.row_width, parts)
        numbers = [int(match[2]) for match in experts if match is not None]
        first = named[0]
        assert first.name is not None
        owner = experts[0]
        assert owner is not None
        name = peft_name(f"{owner[1]}.{owner[3]}", layout)
        shape = (config.experts, *trainable.shapes[first.name])
        if numbers == list(range(numbers[0], numbers[0] + len(parameter))):
            ranges = [(numbers[0], numbers[-1] + 1), *box(first, shape[1:])]
            width = parameter.numel() // len(parameter)
            return _Matrix(trainable.name, len(parameter), width, [[name, shape, ranges, 0, len(parameter)]])
        parts, row = [], 0  # an expert's rows are in several places: gate and up, split over ranks
        for number, piece in zip(numbers, named, strict=True):
            parts.append([name, shape, [(number, number + 1), *box(piece, shape[1:])], row, piece.rows])
            row += piece.rows
        return _Matrix(trainable.name, row, trainable.row_width, parts)


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Adjacent pieces of a tensor, joined. The rows of a query projection, say, come as one piece
    per group of heads.
    """
    joined: list[Piece] = []
    for piece in pieces:
        if (
            joined
            and joined[-1].stop == piece.start
            and replace(joined[-1], stop=piece.stop) == replace(piece, start=joined[-1].start)
        ):
            joined[-1] = replace(joined[-1], stop=piece.stop)
        else:
            joined.append(piece)
    return joined


def _share_out(gathered: Sequence[Sequence[dict[str, Any]]]) -> list[list[int]]:
    """The matrices that each rank sends. A matrix that several ranks hold goes to the rank with the
    fewest bytes so far.
    """
    holders: dict[str, list[tuple[int, int]]] = {}
    for rank, matrices in enumerate(gathered):
        for i, matrix in enumerate(matrices):
            holders.setdefault(repr(matrix["parts"]), []).append((rank, i))
    loads, shares = [0] * len(gathered), [[] for _ in gathered]
    for copies in holders.values():
        rank, i = min(copies, key=lambda copy: (loads[copy[0]], copy[0]))
        loads[rank] += gathered[rank][i]["rows"] * gathered[rank][i]["width"]
        shares[rank].append(i)
    return shares


def _source(description: dict[str, Any], dtype: torch.dtype) -> Source:
    parts = tuple(
        Part(TensorMeta(name, dtype, tuple(shape)), tuple((low, high) for low, high in ranges), row, rows)
        for name, shape, ranges, row, rows in description["parts"]
    )
    return Source(description["key"], dtype, description["rows"], description["width"], parts)
