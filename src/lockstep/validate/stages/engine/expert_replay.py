"""Stage expert_replay: the trainer computes with the experts that another program recorded.

Hugging Face records its routers' choices; the trainer replays them. The trainer's own accounting
(each record used exactly once) runs with it.

Shapes: R rows, S row length, L mixture-of-experts layers, K experts per token, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.batching.packed_batch import PackedBatch
from lockstep.engine.state import TrainerState
from lockstep.engine.steps.checks import expert_choices_that_differ
from lockstep.engine.steps.score import score
from lockstep.validate.figures import Figure, Outcome, count, figure, judged
from lockstep.validate.reference.batches import batch_of, tree_sequences
from lockstep.validate.reference.hugging_face import hugging_face
from lockstep.validate.reference.layout_problem import silent
from lockstep.validate.reference.trainers import start_rank, weights_trainer
from lockstep.validate.request import Request
from lockstep.validate.stages.engine.packing_invariance import of_sequences
from lockstep.validate.tolerances import limit_of


def problem(folder: Path, seed: int) -> tuple[PackedBatch, np.ndarray]:
    """(rows with Hugging Face's choices, its log-probabilities `[T]` of each sequence's tokens)."""
    rng = np.random.default_rng(seed)
    batch = batch_of(tree_sequences(rng), rng, row_length=40)
    model = hugging_face(folder)
    decoder = getattr(model.model, "language_model", model.model)
    routers = [layer.mlp.gate for layer in decoder.layers if hasattr(layer.mlp, "gate")]
    chosen: list[list[torch.Tensor]] = [[] for _ in routers]
    handles = [router.register_forward_hook(_kept(kept)) for router, kept in zip(routers, chosen, strict=True)]
    expected: list[np.ndarray] = []
    experts_RSLK: np.ndarray | None = None
    for q in range(len(batch.leaf_Q)):
        row, path = int(batch.row_Q[q]), batch.path_index(q)
        ids = torch.from_numpy(batch.tokens_RS[row, path].astype(np.int64))
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].float().log_softmax(-1)
        expected.append(log_p.gather(1, ids[1:, None])[:, 0].numpy())
        choices_SLK = torch.stack([kept[-1] for kept in chosen], 1).numpy()
        if experts_RSLK is None:
            places = np.arange(choices_SLK.shape[2], dtype=np.uint8)
            experts_RSLK = np.broadcast_to(places, (*batch.tokens_RS.shape, *choices_SLK.shape[1:])).copy()
        experts_RSLK[row, path] = choices_SLK
    for handle in handles:
        handle.remove()
    return replace(batch, experts_RSLK=experts_RSLK), np.concatenate(expected)


def _kept(kept: list[torch.Tensor]) -> Any:
    """A hook that keeps a router's chosen experts: the integers among its results."""

    def hook(_module: Any, _inputs: Any, results: Any) -> None:
        kept.append(next(result for result in results if not result.is_floating_point()))

    return hook


class Replay:
    """A trainer and what it replays. batch: may be changed before a measurement."""

    def __init__(self, request: Request) -> None:
        self.batch, self._expected_T = problem(request.base_model, request.seed)
        self.trainer: TrainerState = weights_trainer(request.base_model)
        self.live = self

    def measure(self) -> list[Figure]:
        """Figures of the replayed rows. Raises TrainerError where a record was not used once."""
        temperate = replace(self.batch, temperatures_RS=np.ones_like(self.batch.temperatures_RS))
        scores_T = of_sequences(temperate, score(self.trainer, temperate, silent))
        differences = np.abs(scores_T - self._expected_T).tolist()
        name = "replayed log-probabilities"
        share = expert_choices_that_differ(self.trainer)["expert_choices_differ"]
        return [
            figure(name, differences, lambda token: f"token {token}", limit_of(name, "float32"), unit="nats"),
            count("choices that the trainer's router would not make", share, limit_of("own choices", "float32")),
        ]


def run(request: Request) -> Outcome:
    """See the module."""
    start_rank(request.seed)
    request.say("Hugging Face records its choices")
    replay = Replay(request)
    figures = replay.measure()
    assert replay.batch.experts_RSLK is not None
    return judged(figures, [f"records of {replay.batch.experts_RSLK.shape[2]} layers, every one used once"])
