"""The data of a step as a packed batch on disk: of rollouts, or of chats."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.batching.chats import ChatFormat, tokenize_chats
from lockstep.batching.pack import save_batch
from lockstep.batching.prepare import Prepared, prepare
from lockstep.batching.supervised import prepare_supervised
from lockstep.batching.token_table import TokenTable
from lockstep.inference.tokenizer_files import argument, read_tokenizer

if TYPE_CHECKING:
    from lockstep.backends.megatron.run import Run
    from lockstep.batching.prefix_tree import TokenSequence
    from lockstep.config.sft import SFTConfig
    from lockstep.config.train import TrainConfig
    from lockstep.rollouts.trajectory import TrajectoryGroup


@dataclass(frozen=True)
class PackedFile:
    """A packed batch on disk."""

    path: Path
    sequences: Sequence[TokenSequence]
    metrics: dict[str, float]
    tokens: TokenTable


async def packed_groups(run: Run, groups: Sequence[TrajectoryGroup], config: TrainConfig) -> PackedFile:
    """Raises DataError or StaleRolloutError for groups that can't be trained on."""
    settings = run.settings
    prepared = await asyncio.to_thread(
        prepare,
        groups,
        model_name=run.model.name,
        step=run.model.step,
        config=config,
        data=settings.parallel.data,
        routed_experts=settings.routed_experts,
        row_limit=settings.row_limit,
        vocabulary=settings.vocabulary,
    )
    return await _saved(run, prepared)


async def packed_chats(run: Run, chats: Sequence[Mapping[str, Any]], config: SFTConfig) -> PackedFile:
    """Raises DataError for chats that can't be trained on."""
    settings = run.settings
    if run.chat_format is None:
        run.chat_format = await asyncio.to_thread(chat_format, settings.base, settings.server_args)
    longest = config.row_length or settings.max_model_len
    rows = await asyncio.to_thread(tokenize_chats, chats, run.chat_format, config.loss_on, longest)
    rows.check(config.skip_bad_rows, "the batch")
    prepared = await asyncio.to_thread(
        prepare_supervised,
        rows.rows,
        step=run.model.step,
        config=config,
        data=settings.parallel.data,
        row_limit=settings.row_limit,
    )
    return await _saved(run, prepared)


async def _saved(run: Run, prepared: Prepared) -> PackedFile:
    path = run.store.path / "batches" / f"{run.model.step:04d}.safetensors"
    await asyncio.to_thread(save_batch, prepared.batch, path)
    tokens = TokenTable.of(prepared.batch, prepared.packed)
    return PackedFile(path, prepared.sequences, dict(prepared.metrics), tokens)


def chat_format(model: Path, server_args: Sequence[str] = ()) -> ChatFormat:
    """How the model's chats become tokens: its tokenizer, the chat template that the server uses, and
    the ids that end a turn.
    """
    from transformers import AutoTokenizer

    files = read_tokenizer(model, server_args)
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    stops = {tokenizer.eos_token_id}
    generation = model / "generation_config.json"
    if generation.is_file():
        listed = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") or []
        stops |= set(listed if isinstance(listed, list) else [listed])
    overridden = files.template if argument(server_args, "chat-template") else None
    return ChatFormat(tokenizer, frozenset(int(stop) for stop in stops if stop is not None), overridden)
