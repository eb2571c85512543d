"""Faults in what ranks write, in adapters that are exported, and in tokenizers and templates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.models.checkpoint.shares import Share
from lockstep.validate.faults.fault import Fault, moe, replaced
from lockstep.validate.reference.assembled import Rank

if TYPE_CHECKING:
    from lockstep.validate.faults.benches import RoundTripBench, TemplateBench

ROUND_TRIP, TEMPLATE = "weight_round_trip", "tokenizer_and_template"
COVERAGE, REPLAY = "lora_coverage", "expert_replay"


def _drop(shares: list[list[Share]], _ranks: Sequence[Rank]) -> None:
    del shares[-1][-1]


def _double(shares: list[list[Share]], ranks: Sequence[Rank]) -> None:
    """A later rank supplies the first rank's part of one split matrix."""
    first = {shard.megatron: shard.pieces for shard in ranks[0][0]}
    rank, name = next(
        (rank, share.shard.megatron)
        for rank, supplied in enumerate(shares)
        for share in supplied
        if len(share.shard.shape) == 2 and share.shard.pieces != first[share.shard.megatron]
    )
    ranks[rank][1][name] = ranks[0][1][name].clone()  # pyright: ignore[reportIndexIssue]


def _exchange(shares: list[list[Share]], ranks: Sequence[Rank]) -> None:
    """A rank writes its experts in the other order."""
    rank, name = next(
        (rank, share.shard.megatron)
        for rank, supplied in enumerate(shares)
        for share in supplied
        if share.shard.domain == "expert_tensor"
    )
    ranks[rank][1][name] = ranks[rank][1][name].flip(0)  # pyright: ignore[reportIndexIssue]


def _spoils(change: Any) -> Any:
    @contextmanager
    def plant(bench: RoundTripBench) -> Iterator[None]:
        with replaced(bench, "spoil", change):
            yield

    return plant


@contextmanager
def wrong_eos(bench: TemplateBench) -> Iterator[None]:
    tokenizer, before = bench.tokenizer, bench.tokenizer.eos_token
    other = next(token for token in tokenizer.all_special_tokens if token != before)
    tokenizer.eos_token = other
    try:
        yield
    finally:
        tokenizer.eos_token = before


@contextmanager
def thinking_dropped(bench: TemplateBench) -> Iterator[None]:
    """The server's template cuts the reasoning out of earlier turns."""
    cut = (
        "{%- set kept = namespace(list=[]) %}{%- for m in messages %}"
        "{%- if m.role == 'assistant' and '</think>' in (m.content or '') %}"
        "{%- set kept.list = kept.list + [{'role': m.role, 'content': m.content.split('</think>')[-1]}] %}"
        "{%- else %}{%- set kept.list = kept.list + [m] %}{%- endif %}{%- endfor %}{%- set messages = kept.list %}"
    )
    plain, with_tools = bench.templates
    with replaced(bench, "templates", (cut + (plain or ""), cut + (with_tools or ""))):
        yield


@contextmanager
def expert_left_out(bench: Any) -> Iterator[None]:
    """The export forgets one expert's pair."""
    honest = bench.export

    def export() -> dict[str, Any]:
        tensors = honest()
        name = next(name for name in sorted(tensors) if ".experts.1." in name)
        return {n: t for n, t in tensors.items() if n.rsplit(".", 1)[0] != name.rsplit(".", 1)[0]}

    with replaced(bench, "export", export):
        yield


def _shifts(axis: int) -> Any:
    """Records of the place before, along the row's tokens or the layers."""

    @contextmanager
    def plant(bench: Any) -> Iterator[None]:
        shifted = np.roll(bench.batch.experts_RSLK, 1, axis=axis)
        with replaced(bench, "batch", dataclasses.replace(bench.batch, experts_RSLK=shifted)):
            yield

    return plant


@contextmanager
def target_frozen(bench: Any) -> Iterator[None]:
    """One module's A is wrapped and not trained."""
    parameter = next(t.parameter for t in bench.trainer.trainables if ".lora_A." in t.name)
    parameter.requires_grad_(False)
    try:
        yield
    finally:
        parameter.requires_grad_(True)


FILE_FAULTS = (
    Fault("a TP shard dropped on save", "a rank's part of a tensor is not gathered", ROUND_TRIP, "round trip",
          _spoils(_drop)),
    Fault("a TP shard doubled on save", "a split tensor is taken for a replicated one", ROUND_TRIP, "round trip",
          _spoils(_double)),
    Fault("experts exchanged on save", "local expert numbers are written as global ones", ROUND_TRIP, "round trip",
          _spoils(_exchange), moe),
    Fault("a wrong EOS", "the tokenizer's end of text is not the end of a turn", TEMPLATE, "template", wrong_eos),
    Fault("a template that drops thinking", "server and trainer render a history by different templates", TEMPLATE,
          "template", thinking_dropped),
    Fault("one expert's adapter left out", "an export loops over one expert too few", COVERAGE, "coverage",
          expert_left_out, moe),
    Fault("a target wrapped and not trained", "a parameter is missing in the optimizer's groups", COVERAGE, "coverage",
          target_frozen),
    Fault("routed experts shifted by one token", "records begin at the reply and not at the prompt", REPLAY, "replay",
          _shifts(1), moe),
    Fault("routed experts shifted by one layer", "dense layers are counted among the records", REPLAY, "replay",
          _shifts(2), moe),
)  # fmt: skip
"""Planted in what the stages that read and write files measure."""
