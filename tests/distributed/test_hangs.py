"""A rank that hangs while the other waits for it in a collective (audit M4)."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from cases import tiny
from endless import LOOP, endless_on_signal
from frozen_processes import below
from lockstep.batching.pack import save_batch
from lockstep.config.megatron import Parallel
from lockstep.config.train import TrainConfig
from lockstep.errors import TrainerLostError
from lockstep.trainer.client import Trainer
from lockstep.trainer.life import Signs
from lockstep.trainer.protocol import EngineConfig, LoraSettings, TrainStep
from lockstep.validate.reference.batches import batch_of, tree_sequences

pytestmark = pytest.mark.distributed


async def test_m4_a_rank_that_loops_while_the_other_waits_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(endless_on_signal(tmp_path)))
    model, rng = tiny("qwen3", tmp_path / "model", seed=1), np.random.default_rng(7)
    save_batch(batch_of(tree_sequences(rng, leaves=9), rng, row_length=32, data=2), tmp_path / "batch.safetensors")
    settings = EngineConfig(str(model), Parallel(data=2), lora=LoraSettings(8, 16, ("q_proj", "down_proj")))
    trainer = await Trainer.start(settings, 2, tmp_path / "logs" / "trainer.log")
    try:
        step = TrainStep(tmp_path / "batch.safetensors", TrainConfig(max_mismatch=None), out=None)
        await trainer.call(step, deadline_s=120)
        ranks = {rank_of(pid): pid for pid in below(trainer._child.pid) if rank_of(pid) is not None}
        heard, struck_at = Signs.heard, []

        def striking(life, event):
            if not struck_at and event.get("phase") == "forward_backward":
                struck_at.append(time.monotonic())
                os.kill(ranks[1], LOOP)
            return heard(life, event)

        monkeypatch.setattr(Signs, "heard", striking)

        async def steps():
            for _ in range(20):  # where the signal comes too late for one step, it hits the next
                await trainer.call(step, deadline_s=120)

        with pytest.raises(TrainerLostError) as lost:
            await steps()
        took_s = time.monotonic() - struck_at[0]
        said = re.search(
            r"stands still during train_step, busy with \w+, since .* rank 0 at (.*), rank 1 at (.*);", str(lost.value)
        )
        assert said, lost.value
        # The signal may find rank 1 as it ends its own signs of life, where no handler runs.
        assert "endless" in said[2] or "heartbeat.py" in said[2]
        assert "endless" not in said[1]
        assert took_s < 20  # HUNG_S, and what a busy machine adds
    finally:
        await trainer.close()


def rank_of(pid: int) -> int | None:
    """The rank that a process is; None for a launcher, a guard or a helper."""
    words, command = (Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0") for name in ("environ", "cmdline"))
    own_ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
    return (
        own_ranks[0]
        if own_ranks and b"lockstep.engine.worker" in command and b"lockstep.engine.parallel.launch" not in command
        else None
    )
