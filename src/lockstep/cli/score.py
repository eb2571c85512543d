"""`lockstep score`: log-probabilities of token sequences, computed by the training engine at any
parallel size.

A line in: {"id": "a", "tokens": [1, 2, 3], "routed_experts": null}. A line out: {"id": "a",
"logprobs": [-1.2, -0.4]}, in input order, with a value (nats) per token after the first.
`routed_experts` are expert ids [tokens][MoE layers][experts per token] for mixture-of-experts
models.

Shape suffixes: S tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from safetensors.numpy import load_file

from lockstep.backends.megatron.plan.settings import routed_experts_shape
from lockstep.batching.pack import pack, save_batch
from lockstep.batching.packed_batch import unpack_scores
from lockstep.batching.prefix_tree import TokenSequence, scoring_sequence
from lockstep.batching.routed_experts import check_ids
from lockstep.config import deadlines
from lockstep.config.base import Config
from lockstep.config.megatron import Parallel
from lockstep.errors import ConfigError, DataError, TrainerError
from lockstep.models.checkpoint.hub import checkpoint_folder
from lockstep.models.config import ModelConfig, checkpoint_dtype
from lockstep.models.registry import load_model_config
from lockstep.process.durable import write_whole
from lockstep.trainer.client import Trainer
from lockstep.trainer.protocol import EngineConfig, Score, from_json


class Line(Config):
    """One input line."""

    id: str = Field(description="names the line in the output")
    tokens: list[int] = Field(min_length=2, description="ids of a sequence")
    routed_experts: list[list[list[int]]] | None = Field(
        default=None, description="experts of each token and layer, for a mixture of experts; none: the router's own"
    )


@dataclass(frozen=True)
class Scored:
    """Log-probability (nats) of each token after the first."""

    id: str
    logprobs: list[float]


def read_lines(path: Path) -> list[Line]:
    """Read a JSON-lines file. Raises DataError naming the line: not JSON, unknown key, fewer than
    two tokens, an id twice.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist: give a JSON-lines file with id and tokens")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8: give a JSON-lines file with id and tokens") from None
    lines, seen = [], set()
    for number, row in enumerate(text.split("\n"), 1):  # only these: JSON strings may hold other line separators
        if not row.strip():
            continue
        try:
            raw = json.loads(row)
            line = Line(**_current(raw)) if isinstance(raw, dict) else None
        except (json.JSONDecodeError, ConfigError) as error:
            raise DataError(f"{path} line {number}: {error}") from None
        if line is None:
            raise DataError(f"{path} line {number}: expected an object with id and tokens")
        if line.id in seen:
            raise DataError(f"{path} line {number}: id {line.id!r} occurs twice")
        seen.add(line.id)
        lines.append(line)
    if not lines:
        raise DataError(f"{path} is empty: there is nothing to score")
    return lines


def _current(raw: dict[str, Any]) -> dict[str, Any]:
    """A line of an earlier version, whose routed experts were called `routes`, in today's names."""
    if "routes" in raw and "routed_experts" not in raw:
        return {"routed_experts" if name == "routes" else name: value for name, value in raw.items()}
    return raw


def _sequences(lines: Sequence[Line], config: ModelConfig) -> list[TokenSequence]:
    sequences = []
    for line in lines:
        outside = next((token for token in line.tokens if not 0 <= token < config.vocab_size), None)
        if outside is not None:
            raise DataError(f"{line.id}: token {outside} is outside the vocabulary of {config.vocab_size}")
        sequences.append(scoring_sequence(line.id, line.tokens, _routed_experts(line, config)))
    return sequences


def _routed_experts(line: Line, config: ModelConfig) -> np.ndarray | None:
    """[S, L, K] uint8 or uint16. Raises DataError for routed experts that are not this model's."""
    if line.routed_experts is None:
        return None
    shape = routed_experts_shape(config)
    if shape is None:
        raise DataError(f"{line.id} has routed_experts, and the model has no experts: leave them out")
    wanted = (len(line.tokens), shape.layers, shape.top_k)
    regular = all(
        len(layers) == shape.layers and all(len(ids) == shape.top_k for ids in layers) for layers in line.routed_experts
    )
    if len(line.routed_experts) != wanted[0] or not regular:
        raise DataError(
            f"{line.id}: routed_experts must be [tokens][MoE layers][experts per token], here {list(wanted)}"
        )
    experts_SLK = np.asarray(line.routed_experts, dtype=np.int64)
    check_ids(experts_SLK, shape, line.id)
    return experts_SLK.astype(shape.dtype)


def _settings(model: Path, adapter: Path | None, parallel: Parallel, dtype: str | None) -> EngineConfig:
    return from_json(
        EngineConfig,
        {
            "model": str(model),
            "adapter": None if adapter is None else str(adapter.resolve()),
            "dtype": dtype or checkpoint_dtype(model),
            "parallel": parallel,
            "trains": False,
        },
        "lockstep score",
    )


async def score(
    base_model: str,
    lines: Sequence[Line],
    *,
    adapter: Path | None = None,
    parallel: Parallel | None = None,
    packed: bool = False,
    dtype: str | None = None,
    log_path: Path | None = None,
) -> list[Scored]:
    """Score `lines` with the engine, in input order.

    packed: put the sequences into prefix trees first; the values don't change.
    dtype: None takes the checkpoint's.

    Raises UnsupportedModelError, DataError, WeightsError, or TrainerError.
    """
    folder, parallel = checkpoint_folder(base_model), parallel or Parallel()
    sequences = _sequences(lines, load_model_config(str(folder)))
    count = len(sequences)
    batch = pack(sequences, np.zeros(count), np.ones(count), share_prefixes=packed, data=parallel.data)
    scratch = Path(tempfile.mkdtemp(prefix="lockstep-score-"))
    try:
        batch_path, out = scratch / "batch.safetensors", scratch / "scores.safetensors"
        await asyncio.to_thread(save_batch, batch, batch_path)
        log = log_path or scratch / "logs" / "trainer.log"
        trainer = await Trainer.start(_settings(folder, adapter, parallel, dtype), parallel.processes, log)
        try:
            await trainer.call(Score(batch_path, out), deadline_s=deadlines.SCORING_S)
        finally:
            await trainer.close()
        values_RS = load_file(out)["logprobs_RS"]
    except TrainerError:
        raise  # it names the log, which stays
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch)
    sequence_values = unpack_scores(batch, values_RS)
    return [Scored(line.id, [float(v) for v in values]) for line, values in zip(lines, sequence_values, strict=True)]


def write_lines(path: Path, scored: Sequence[Scored]) -> None:
    """Write the results as JSON lines, all or nothing."""
    text = "".join(json.dumps({"id": scores.id, "logprobs": scores.logprobs}) + "\n" for scores in scored)
    write_whole(path, text)
