"""Stage lora_coverage: every target is wrapped, trained, exported, and has its effect in trainer and
server.

The batch replays random experts, so that each expert gets tokens.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
from torch import Tensor

from lockstep.engine.optim.optimizer import OptimizerStep
from lockstep.engine.state import save_step
from lockstep.engine.steps.score import score
from lockstep.models.checkpoint.peft import read_adapter
from lockstep.models.registry import default_target_modules_for_model
from lockstep.validate.figures import Figure, Outcome, count, judged
from lockstep.validate.reference.batches import batch_of, tree_sequences, with_random_experts
from lockstep.validate.reference.parity import ADAPTER_ALPHA, ADAPTER_RANK, slopes
from lockstep.validate.reference.passes import run_passes
from lockstep.validate.reference.trainers import adapter_trainer, set_adapters, start_rank
from lockstep.validate.request import Request
from lockstep.validate.stages.server.adapted_targets import served_targets

_TOKENS_OF_AN_EXPERT = 20
_LEAF_TOKENS = 4
_SCALE = ADAPTER_ALPHA / ADAPTER_RANK
_EFFECT = 1e-5
"""Nats: below, an adapter counts as one without effect."""


class Coverage:
    """A trainer of adapters on all default targets, and what it exports."""

    def __init__(self, folder: Path, seed: int, scratch: Path) -> None:
        self.trainer, self.adapters = adapter_trainer(folder, seed)
        self.targets = tuple(default_target_modules_for_model(str(folder)))
        self._scratch = scratch / "exported"
        self.exported_scale = 0.0
        config = self.trainer.config
        tokens = _TOKENS_OF_AN_EXPERT * config.experts / max(1, config.experts_per_token)
        rng = np.random.default_rng(seed)
        batch = batch_of(tree_sequences(rng, leaves=max(9, math.ceil(tokens / _LEAF_TOKENS))), rng, row_length=128)
        self.batch = with_random_experts(batch, config, seed)
        self.slope_P = slopes(batch, seed)

    def export(self) -> dict[str, Tensor]:
        """What is written to disk for a server, by canonical name."""
        shutil.rmtree(self._scratch, ignore_errors=True)
        save_step(self.trainer, self._scratch)
        trainer = self.trainer
        path, layout = self._scratch / "adapter", trainer.checkpoint.layout
        tensors, info = read_adapter(path, trainer.sites, trainer.config, layout)
        self.exported_scale = info.scale
        return tensors

    def measure(self) -> list[Figure]:
        """Figures of one update; the adapters get their first values back."""
        wanted = {s.module for s in self.trainer.sites if s.target in self.targets}
        wrapped = {name.removesuffix(".lora_A") for name in self.trainer.shapes if name.endswith(".lora_A")}
        before = self.export()
        run_passes(self.trainer, self.batch, self.slope_P)
        norm = self.trainer.optimizer.reduce()
        self.trainer.optimizer.step(OptimizerStep(1.0, max_norm=None, kind="sgd"), norm)
        after = self.export()
        lost = sorted(set(self.trainer.shapes) - set(after))
        still = sorted(name for name in set(after) & set(before) if (after[name] == before[name]).all())
        self.restore()
        wrong = [n for n in before if float((before[n] - self.adapters[n]).abs().max()) > 0]
        adapted = {id(trainable.parameter) for trainable in self.trainer.trainables}
        named = self.trainer.model.named_parameters()
        others = [name for name, p in named if p.requires_grad and id(p) not in adapted]
        idle = self._idle_targets()
        return [
            _named("modules that are not wrapped", sorted(wanted - wrapped)),
            _named("adapter matrices that a step does not move", still),
            _named("adapter matrices missing in the export", lost),
            _named("exported matrices that differ from the trainer's", wrong),
            _named("trained parameters outside of the adapters", others),
            count("exported alpha / rank against the trainer's", abs(self.exported_scale / _SCALE - 1), 1e-6),
            _named("targets without effect", idle),
        ]

    def restore(self) -> None:
        """The adapters' first values."""
        set_adapters(self.trainer, self.adapters)
        self.trainer.optimizer.zero()

    def _idle_targets(self) -> list[str]:
        """Targets whose adapters alone change no log-probability."""
        without = self._scores(set())
        idle = [t for t in self.targets if np.nanmax(np.abs(self._scores({t}) - without)) < _EFFECT]
        self.restore()
        return idle

    def _scores(self, targets: set[str]) -> np.ndarray:
        """Log-probabilities with the adapters of `targets` only."""
        kept = {f"{site.module}.lora_B" for site in self.trainer.sites if site.target in targets}
        values = {n: t if n in kept or n.endswith("lora_A") else t * 0 for n, t in self.adapters.items()}
        set_adapters(self.trainer, values)
        return score(self.trainer, self.batch, lambda _event: None)


def _named(name: str, wrong: list[str]) -> Figure:
    return count(name, len(wrong), where=", ".join(wrong[:3]))


async def run(request: Request) -> Outcome:
    """See the module."""
    served = await served_targets(request)  # first: on a GPU the server needs what a trainer would hold
    start_rank(request.seed)
    coverage = Coverage(request.base_model, request.seed, request.folder)
    figures = [*coverage.measure(), *served]
    notes = [f"targets: {', '.join(coverage.targets)}", f"{len(coverage.trainer.shapes)} matrices"]
    return judged(figures, notes)
