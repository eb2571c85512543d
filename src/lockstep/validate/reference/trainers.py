"""Trainers of a single rank in this process, as the engine's stages need them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from lockstep.config.megatron import Parallel
from lockstep.engine.optim.trainable import assign
from lockstep.engine.parallel import device  # first: prepares torch for Megatron
from lockstep.engine.parallel.launch import FOLDER_VARIABLE
from lockstep.engine.state import TrainerState, open_trainer
from lockstep.models.registry import default_target_modules_for_model
from lockstep.trainer.protocol import EngineConfig, LoraSettings
from lockstep.validate.reference.parity import ADAPTER_ALPHA, ADAPTER_RANK, random_adapters


def start_rank(seed: int) -> None:
    """This process becomes a whole trainer: process groups of size one, met in memory."""
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault(FOLDER_VARIABLE, tempfile.gettempdir())  # one rank keeps its store in memory
    device.start(Parallel(data=int(os.environ["WORLD_SIZE"])), seed)


def weights_trainer(folder: Path, dtype: str = "float32", parallel: Parallel | None = None) -> TrainerState:
    """A trainer of all weights."""
    settings = {"model": str(folder), "parallel": parallel or Parallel(), "dtype": dtype, "recompute": False}
    return open_trainer(EngineConfig(**settings))


def adapter_trainer(
    folder: Path, seed: int, dtype: str = "float32", parallel: Parallel | None = None, size: float = 0.05
) -> tuple[TrainerState, dict[str, torch.Tensor]]:
    """(a trainer of adapters on the family's default targets, the random values they got)."""
    targets = tuple(default_target_modules_for_model(str(folder)))
    lora = LoraSettings(ADAPTER_RANK, ADAPTER_ALPHA, targets)
    settings = {"model": str(folder), "parallel": parallel or Parallel(), "dtype": dtype, "recompute": False}
    trainer = open_trainer(EngineConfig(**settings, lora=lora))
    adapters = random_adapters(trainer, seed, size)
    set_adapters(trainer, adapters)
    return trainer, adapters


def set_adapters(trainer: TrainerState, adapters: dict[str, torch.Tensor]) -> None:
    """Give a trainer's adapters these values, in the model and in the optimizer's masters."""
    assign(trainer.trainables, adapters)
    for bucket in trainer.optimizer.buckets:
        bucket.master.copy_(bucket.weights[bucket.low : bucket.high].detach())
