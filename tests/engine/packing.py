"""The loss and every gradient of one batch, packed as trees or as plain rows, from the real engine at whatever sizes are up.

Run as a program under torch.distributed.run it compares both over several random batches and writes the worst difference.

Shapes: N scored tokens of a row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.config import TrainConfig
from lockstep.engine import device  # first: prepares torch for Megatron
from lockstep.engine.device import Parallelism
from lockstep.engine.loss import policy_loss, scored_tensors
from lockstep.engine.pipeline import forward_backward
from lockstep.engine.session import LoraSettings, Session, Settings, open_session
from lockstep.engine.step import _head, _shard, prepare
from lockstep.families.registry import default_target_modules_for_model
from lockstep.families.tiny import write_tiny
from lockstep.tokens.batch import PackedBatch, total_weight
from lockstep.tokens.pack import pack
from lockstep.tokens.tree import TokenSequence

from drawing import random_sequences  # isort: skip

LAYERS, TOP_K, EXPERTS = 2, 2, 8
SIZES: dict[str, Any] = {"num_hidden_layers": LAYERS, "hidden_size": 64, "dtype": "float32"}
HYBRID: dict[str, Any] = {"full_attention_interval": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": SIZES | {"intermediate_size": 96},
    "qwen3_moe": SIZES | {"moe_intermediate_size": 32},
    "qwen3_5": SIZES | HYBRID | {"intermediate_size": 96},
    "qwen3_5_moe": SIZES | HYBRID | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}
"""Every kind of layer once, as small as it goes."""

CONFIGS = {
    "cispo": TrainConfig(loss="cispo", clip_low=0.9, clip_high=20.0, kl_coef=0.05),
    "ppo": TrainConfig(loss="ppo", clip_low=0.9, clip_high=2.0),
    "gspo": TrainConfig(loss="gspo", clip_low=0.9, clip_high=20.0, kl_coef=0.05),
}


def open_tiny(family: str, folder: Path, dtype: str, lora: bool, parallel: Parallelism) -> Session:
    """A session on a new tiny model; a LoRA adapter gets values, so that both of its matrices have gradients."""
    folder = folder / "model"
    if dist.get_rank() == 0:
        write_tiny(family, folder, seed=3, overrides=FAMILIES[family])
    dist.barrier()
    targets = tuple(default_target_modules_for_model(str(folder)))
    settings = Settings(str(folder), parallel, dtype=dtype, lora=LoraSettings(8, 16, targets) if lora else None)
    session = open_session(settings)
    if lora:
        generator = torch.Generator().manual_seed(4)
        for bucket in session.optimizer.buckets:
            bucket.weights.copy_(torch.randn(bucket.size, generator=generator, dtype=torch.float64) * 0.1)
    return session


def loss_and_gradients(session: Session, batch: PackedBatch, config: TrainConfig) -> tuple[float, Tensor]:
    """(normalised loss, all of this rank's gradients as one vector), exactly as a training step computes them."""
    work = prepare(session, batch, list(range(batch.rows)))
    weight, total = total_weight(batch), torch.zeros((), dtype=torch.float64)

    def last(number: int, hidden: Tensor) -> Tensor:
        scored = work[number].scored
        new_N, entropy_N = _head(session, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)
        # The reference only has to be the same function of the token in both packings.
        reference_N = torch.from_numpy(scored.sampling_N).to(new_N) - 0.3 if config.kl_coef else None
        part = policy_loss(scored_tensors(scored, new_N, entropy_N.detach(), reference_N=reference_N), config)
        total.add_(part.loss.detach().double() / weight)
        return part.loss / weight

    session.optimizer.zero()
    forward_backward(session.model, [one.row for one in work], last, _shard(session))
    session.optimizer.reduce()
    # Where replicas share a bucket, each holds the sum for its own slice only.
    gradients = torch.cat([bucket.gradients[bucket.low : bucket.high] for bucket in session.optimizer.buckets]).clone()
    return float(total), gradients


def draw(seed: int, leaves: int, moe: bool) -> tuple[list[TokenSequence], np.ndarray, np.ndarray]:
    """Sequences that branch at random points, with logprobs near what a random model gives, advantages and weights."""
    random = np.random.default_rng(seed)
    routes = (LAYERS, TOP_K, EXPERTS) if moe else None
    sequences = random_sequences(random, leaves, vocabulary=200, routes=routes)
    return sequences, random.normal(size=leaves), random.uniform(0.1, 2, size=leaves)


def difference(session: Session, seed: int, leaves: int, config: TrainConfig, tight: bool) -> dict[str, float]:
    """Relative differences of loss and gradients between packed trees and one row per sequence; and what packing saved.

    tight: rows so short that a tree has to be cut and its prefix computed again.
    """
    sequences, advantages, weights = draw(seed, leaves, session.config.is_moe)
    longest, multiple = max(map(len, sequences)), 2 * session.parallel.tensor
    trees = pack(sequences, advantages, weights, row_length=longest if tight else 1024, multiple=multiple)
    plain = pack(sequences, advantages, weights, row_length=longest, share_prefixes=False, multiple=multiple)
    loss, gradients = loss_and_gradients(session, trees, config)
    expected_loss, expected = loss_and_gradients(session, plain, config)
    return {
        "loss": abs(loss - expected_loss) / max(1.0, abs(expected_loss)),
        "gradient": float((gradients - expected).abs().max() / expected.abs().max().clamp(min=1e-9)),
        "size": float(expected.abs().max()),
        "tokens": float((trees.nodes_RS >= 0).sum()),
        "unpacked": float((plain.nodes_RS >= 0).sum()),
    }


def main() -> None:
    """argv: folder, parallel sizes as JSON, dtype. Writes folder/result-RANK.json: the worst difference per family."""
    folder, parallel = Path(sys.argv[1]), Parallelism(**json.loads(sys.argv[2]))
    torch.set_num_threads(1)
    device.start(parallel, seed=0)
    worst: dict[str, dict[str, float]] = {}
    for family in FAMILIES:
        session = open_tiny(family, folder / family, sys.argv[3], lora=False, parallel=parallel)
        for seed, (name, config) in enumerate(CONFIGS.items()):
            found = difference(session, seed + 100, leaves=5, config=config, tight=seed % 2 == 1)
            worst[f"{family}/{name}"] = found
    (folder / f"result-{dist.get_rank()}.json").write_text(json.dumps(worst))


if __name__ == "__main__":
    main()
