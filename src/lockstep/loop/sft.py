"""Supervised training of a run's first steps: a file of chats, epoch by epoch.

This is the whole of `lockstep sft`; a user's own script can call `backend.train_sft` with their own
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.batching.supervised import drawn_rows, steps_of
from lockstep.errors import StoreError

if TYPE_CHECKING:
    from lockstep.backends.base import TrainResult
    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.batching.chats import Chats
    from lockstep.loop.run_file import SFTSection
    from lockstep.model import TrainableModel
    from lockstep.runs.jobs import Job


@dataclass(frozen=True)
class ChatData:
    """The rows of a data file that can be trained on.

    refused: "line 12: why", of the others.
    tokens, scored: of one epoch, before prefixes are shared; those with loss.
    digest: of the whole file (SHA-256).
    """

    rows: list[dict[str, Any]]
    refused: list[str]
    tokens: int
    scored: int
    digest: str

    @classmethod
    def of(cls, chats: Chats, digest: str) -> ChatData:
        sequences = [sequence for row in chats.rows for sequence in row]
        tokens, scored = sum(map(len, sequences)), sum(sequence.scored for sequence in sequences)
        return cls(chats.raw, chats.refused, tokens, scored, digest)

    def steps(self, section: SFTSection) -> int:
        return steps_of(len(self.rows), section.batch_size, section.epochs)


def check_steps(step: int, steps: int, jobs: Sequence[Job], path: Path) -> None:
    """Raise StoreError for a run whose steps so far are not all those of this command."""
    others = {job.step: job.kind for job in jobs if job.state == "done" and job.kind in ("lora_step", "merged_step")}
    if others:
        first = min(others)
        raise StoreError(
            f"{path}: step {first} was made by rollouts ({others[first]}), and `lockstep sft` makes a run's first steps: choose "
            "another model name, or call backend.train_sft"
        )
    if step > steps:
        raise StoreError(
            f"{path} has {step} steps, the data gives {steps}: raise [sft] epochs to train on, or change the model's name"
        )


async def run_sft(
    model: TrainableModel,
    backend: MegatronBackend,
    data: ChatData,
    section: SFTSection,
    on_step: Callable[[int, Mapping[str, float]], None],
) -> TrainResult | None:
    """Train until the epochs are over; the last step's result, None if none was left.

    The model must be registered. A run that was interrupted, also inside an epoch, goes on with the
    next batch: a step's chats follow from its number. Raises StoreError for another file, order or
    batch size than the run began with.
    """
    steps, store = data.steps(section), backend.run_info(model).store
    check_steps(model.step, steps, store.jobs.listed(), store.path)
    settings = {"batch_size": section.batch_size, "seed": section.seed, "loss_on": section.loss_on}
    store.claim({"sft_data": data.digest} | {f"sft_{name}": value for name, value in settings.items()})
    config, result = section.over(steps), None
    while model.step < steps:
        chosen = drawn_rows(len(data.rows), section.batch_size, section.epochs, section.seed, model.step + 1)
        result = await backend.train_sft(model, [data.rows[row] for row in chosen], config)
        on_step(result.step, result.metrics)
    return result
