"""Supervised steps on the real engine: the loss is Hugging Face's on the same mask, and a resumed run goes on exactly.

Shapes: S tokens, V vocabulary, Q sequences.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases import tiny
from lockstep.batching.chats import tokenize_chats
from lockstep.batching.supervised import drawn_rows, prepare_supervised, steps_of
from lockstep.config.megatron import Parallel
from lockstep.config.sft import SFTConfig
from lockstep.validate.reference.hugging_face import hugging_face

pytestmark = pytest.mark.usefixtures("groups")

SILENT = lambda event: None  # noqa: E731
FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "llama3")


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of two turns that begin alike."""
    words = ["yes", "no", "maybe", "the answer is no", "and yes"]
    return [
        {
            "messages": [
                {"role": "system", "content": "short answers"},
                {"role": "user", "content": f"is it {number % 3}?"},
                {"role": "assistant", "content": words[number % 5]},
                {"role": "user", "content": "and that?"},
                {"role": "assistant", "content": words[(2 * number + 1) % 5]},
            ]
        }
        for number in range(count)
    ]


def opened(folder: Path, lora: bool = False) -> Any:
    from lockstep.engine.state import open_trainer
    from lockstep.models.registry import default_target_modules_for_model
    from lockstep.trainer.protocol import EngineConfig, LoraSettings

    targets = tuple(default_target_modules_for_model(str(folder)))
    return open_trainer(EngineConfig(str(folder), Parallel(), lora=LoraSettings(8, 16, targets) if lora else None))


def hugging_face_loss(folder: Path, rows: list[list[Any]]) -> float:
    """Mean cross entropy over all labels, one sequence at a time, with labels of -100 outside of the mask."""
    model = hugging_face(folder)
    total = count = 0.0
    with torch.no_grad():
        for sequence in chain.from_iterable(rows):
            ids_1S = torch.from_numpy(sequence.tokens_S.astype(np.int64))[None]
            labels_1S = ids_1S.masked_fill(~torch.from_numpy(sequence.loss_mask_S), -100)
            loss = model(input_ids=ids_1S, labels=labels_1S, use_cache=False).loss
            total += float(loss) * sequence.scored
            count += sequence.scored
    return total / count


@pytest.mark.parametrize("loss_on", ["all", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_hugging_face(family, loss_on, tmp_path):
    """Packed with shared prefixes, in two rows, to 1e-5 nats per token."""
    from lockstep.backends.megatron.packed_file import chat_format
    from lockstep.engine.steps.train_step import train_step

    folder = tiny(family, tmp_path / family, seed=4, num_hidden_layers=2, hidden_size=64, dtype="float32")
    tokenized = tokenize_chats(chats(6), chat_format(folder), loss_on, 1000)
    tokenized.check(False, "these")
    config = SFTConfig(learning_rate=1e-9, loss_on=loss_on)
    prepared = prepare_supervised(tokenized.rows, step=0, config=config)
    assert prepared.metrics["shared_share"] > 0.2
    metrics = train_step(opened(folder), prepared.batch, config.step_config(), None, SILENT)
    expected = hugging_face_loss(folder, tokenized.rows)
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["tokens_scored"] <= sum(sequence.scored for row in tokenized.rows for sequence in row)
    assert not {"kl", "ess", "mismatch", "mismatch_max"} & metrics.keys()  # no server sampled these tokens


def test_a_run_that_resumes_inside_an_epoch_ends_with_the_same_weights(tmp_path):
    """Five steps at once, or killed after the second and begun again from its checkpoint: bit for bit."""
    from lockstep.backends.megatron.packed_file import chat_format
    from lockstep.engine.state import load_step, save_step
    from lockstep.engine.steps.train_step import train_step

    folder = tiny("qwen3", tmp_path / "model", seed=4, num_hidden_layers=2, hidden_size=64, dtype="float32")
    tokenized = tokenize_chats(chats(7), chat_format(folder), "all", 1000)
    config = SFTConfig(learning_rate=1e-2, lr_schedule="cosine", warmup_steps=1, minibatches=2).over(5)
    assert steps_of(7, 3, 2) == 5  # steps 3 and 4 cross the epochs' border

    def go_on(trainer: Any, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last + 1):
            rows = [tokenized.rows[row] for row in drawn_rows(7, 3, 2, 0, step)]
            now = config.model_copy(update={"minibatches": 1}) if len(rows) == 1 else config
            batch = prepare_supervised(rows, step=step, config=now).batch
            losses.append(train_step(trainer, batch, now.at_step(step).step_config(), None, SILENT)["loss"])
        return losses

    undisturbed = opened(folder, lora=True)
    losses = go_on(undisturbed, 1, 5)
    first = opened(folder, lora=True)
    go_on(first, 1, 2)
    save_step(first, tmp_path / "step")
    resumed = opened(folder, lora=True)
    load_step(resumed, tmp_path / "step")
    assert go_on(resumed, 3, 5) == losses[2:]
    for ours, theirs in zip(resumed.optimizer.buckets, undisturbed.optimizer.buckets, strict=True):
        assert ours.master.equal(theirs.master)
    assert losses[-1] < losses[0] - 0.3
