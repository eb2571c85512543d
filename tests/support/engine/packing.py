"""The loss and every gradient of one batch, packed as trees or as plain rows, from the real engine at whatever sizes are up.

Run as a program under the trainer's launcher it answers a parent that draws the problems (`pool.Pool`).

Shapes: N scored tokens of a row.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lockstep.batching.pack import pack
from lockstep.batching.packed_batch import PackedBatch, total_weight
from lockstep.batching.prefix_tree import TokenSequence
from lockstep.config.megatron import Parallel
from lockstep.config.train import TrainConfig
from lockstep.engine.losses.policy import policy_loss, scored_tensors
from lockstep.engine.optim.trainable import assign
from lockstep.engine.parallel import device  # first: prepares torch for Megatron
from lockstep.engine.pipeline import forward_backward
from lockstep.engine.state import TrainerState, open_trainer
from lockstep.engine.steps.microbatch import prepare
from lockstep.engine.steps.scored_tokens import head_outputs, row_shards
from lockstep.models.registry import default_target_modules_for_model
from lockstep.models.tiny.write import write_tiny
from lockstep.trainer.protocol import EngineConfig, LoraSettings

from random_batches import random_sequences  # isort: skip
from lockstep.validate.reference.passes import FLOOR

from parity import largest_difference  # isort: skip

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


def open_tiny(family: str, folder: Path, dtype: str, lora: bool, parallel: Parallel) -> TrainerState:
    """A session on the family's tiny model in `folder`, which is made if it isn't there; a LoRA adapter gets values, so that both of
    its matrices have gradients."""
    folder = folder / family
    if not folder.exists():
        write_tiny(family, folder, seed=3, overrides=FAMILIES[family])
    targets = tuple(default_target_modules_for_model(str(folder)))
    settings = EngineConfig(str(folder), parallel, dtype=dtype, lora=LoraSettings(8, 16, targets) if lora else None)
    trainer = open_trainer(settings)
    if lora:
        generator = torch.Generator().manual_seed(4)
        assign(
            trainer.trainables,
            {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in sorted(trainer.shapes.items())},
        )
    return trainer


def loss_and_gradients(trainer: TrainerState, batch: PackedBatch, config: TrainConfig) -> tuple[float, Tensor]:
    """(normalised loss, all of this rank's gradients as one vector), exactly as a training step computes them."""
    work = prepare(trainer, batch, list(range(batch.rows)))
    weight, total = total_weight(batch), torch.zeros((), dtype=torch.float64)

    def last(number: int, hidden: Tensor) -> Tensor:
        scored = work[number].scored
        new_N, entropy_N = head_outputs(trainer, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)
        # The reference only has to be the same function of the token in both packings.
        reference_N = torch.from_numpy(scored.sampling_N).to(new_N) - 0.3 if config.kl_coef else None
        part = policy_loss(scored_tensors(scored, new_N, entropy_N.detach(), reference_N=reference_N), config)
        total.add_(part.loss.detach().double() / weight)
        return part.loss / weight

    trainer.optimizer.zero()
    forward_backward(trainer.model, [micro_batch.row for micro_batch in work], last, row_shards(trainer))
    trainer.optimizer.reduce()
    # Where replicas share a bucket, each holds the sum for its own slice only.
    gradients = torch.cat([bucket.gradients[bucket.low : bucket.high] for bucket in trainer.optimizer.buckets]).clone()
    return float(total), gradients


def draw(seed: int, leaves: int, moe: bool) -> tuple[list[TokenSequence], np.ndarray, np.ndarray]:
    """Sequences that branch at random points, with logprobs near what a random model gives, advantages and weights."""
    random = np.random.default_rng(seed)
    routed_experts = (LAYERS, TOP_K, EXPERTS) if moe else None
    sequences: list[TokenSequence] = []
    while not any(sequence.loss_mask_S.any() for sequence in sequences):  # one draw in hundreds has nothing to train on
        sequences = random_sequences(random, leaves, vocabulary=200, routed_experts=routed_experts)
    return sequences, random.normal(size=leaves), random.uniform(0.1, 2, size=leaves)


@dataclass(frozen=True)
class Drawn:
    """One random problem. tight: rows so short that a tree has to be cut and its prefix computed again."""

    family: str
    seed: int
    leaves: int
    loss: str
    tight: bool
    lora: bool


def batches(drawn: Drawn, multiple: int = 4) -> tuple[PackedBatch, PackedBatch]:
    """(packed as trees, one row per sequence)."""
    sequences, advantages, weights = draw(drawn.seed, drawn.leaves, "moe" in drawn.family)
    longest = max(map(len, sequences))
    trees = pack(sequences, advantages, weights, row_length=longest if drawn.tight else 1024, multiple=multiple)
    plain = pack(sequences, advantages, weights, row_length=longest, share_prefixes=False, multiple=multiple)
    return trees, plain


def distance(trainer: TrainerState, drawn: Drawn, expected: Path, packed: bool = True) -> dict[str, Any]:
    """How far the packed trees' loss and this rank's gradients are from the unpacked ones in the file. Relative: to the tensor's
    largest entry, or the model's largest where rounding to fp32 leaves no more. packed False: of unpacked rows."""
    gradients = load_file(expected)
    wanted = float(gradients.pop("loss"))
    loss, _ = loss_and_gradients(trainer, batches(drawn)[0 if packed else 1], CONFIGS[drawn.loss])
    largest = max(float(values.abs().max()) for values in gradients.values())
    floor = largest * (FLOOR if trainer.settings.dtype == "float64" else 1.0)
    gradient, where = largest_difference(trainer, "gradient", gradients, max(floor, 1e-9))
    return {"loss": abs(loss - wanted) / max(1.0, abs(wanted)), "gradient": gradient, "at": where, "size": largest}


def serve(folder: Path, connection: socket.socket) -> None:
    """Answer {"parallel", "dtype", "drawn", "expected"}, one JSON line each, until the other side hangs up. Models are kept while
    the sizes stay the same."""
    sizes, sessions = None, dict[tuple[str, str, bool], TrainerState]()
    lines = connection.makefile("rw")
    for line in lines:
        asked = json.loads(line)
        if sizes != asked["parallel"]:
            sizes = asked["parallel"]
            sessions.clear()
            device.rebuild_groups(Parallel(**sizes), seed=0)
        drawn = Drawn(**asked["drawn"])
        key = drawn.family, asked["dtype"], drawn.lora
        if key not in sessions:
            sessions[key] = open_tiny(drawn.family, folder, asked["dtype"], drawn.lora, Parallel(**sizes))
        lines.write(json.dumps(distance(sessions[key], drawn, Path(asked["expected"]))) + "\n")
        lines.flush()


def main() -> None:
    """argv: folder with a model per family, path of the parent's socket."""
    torch.set_num_threads(1)
    device.start(Parallel(data=int(os.environ["WORLD_SIZE"])), seed=0, timeout_s=100)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(sys.argv[2])
        serve(Path(sys.argv[1]), connection)


if __name__ == "__main__":
    main()
