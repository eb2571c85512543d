"""The model's values for a row's scored tokens: log-probability, entropy, most likely ids.

Shapes: N scored tokens of a row, P pairs (sequence, such a token), T tokens whose C most likely ids
are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lockstep.batching.packed_batch import ScoredRow
from lockstep.batching.top_logprobs import TOP, hits
from lockstep.engine.layers.lm_head import linear_logprob, most_likely
from lockstep.engine.parallel import context, groups
from lockstep.engine.pipeline import forward_only
from lockstep.engine.state import TrainerState
from lockstep.engine.steps.microbatch import MicroBatch


def head_outputs(
    trainer: TrainerState, hidden: Tensor, predictor: np.ndarray, target: np.ndarray, temperature: np.ndarray
) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) of a row's scored tokens, on every rank; each computes those whose
    predictor is its own.
    """
    own = context.owned(predictor)

    def put(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(hidden.device)

    parts = linear_logprob(
        hidden,
        trainer.model.head_weight(),
        put(predictor[own] // trainer.parallel.context),
        put(target[own]),
        put(temperature[own]),
        trainer.config.vocab_size,
        groups.tensor(),
        trainer.parallel.sequence_parallel,
    )
    logprob_N, entropy_N = (context.collect(part, own, len(predictor)) for part in parts)
    return logprob_N, entropy_N


def most_likely_tokens(
    trainer: TrainerState, hidden: Tensor, predictor: np.ndarray, count: int
) -> tuple[Tensor, Tensor]:
    """(ids in int32, log-probabilities in fp32), each `[N, count]`, on the CPU of every rank; each
    computes those whose predictor is its own.
    """
    own = context.owned(predictor)
    own_tokens = most_likely(
        hidden,
        trainer.model.head_weight(),
        torch.from_numpy(predictor[own] // trainer.parallel.context).to(hidden.device),
        count,
        trainer.config.vocab_size,
        groups.tensor(),
        trainer.parallel.sequence_parallel,
    )
    ids, logprobs = (context.collect(part, own, len(predictor)) for part in own_tokens)
    return ids.to(torch.int32).cpu(), logprobs.float().cpu()


def top_sums(trainer: TrainerState, hidden: Tensor, scored: ScoredRow) -> dict[str, Tensor]:
    """The agreement of a row's most likely tokens with those of its rollouts, over the trained
    step's samples, as sums.
    """
    assert scored.top_PC is not None
    known_P = scored.top_PC[:, 0] >= 0
    if scored.current_N is not None:
        known_P &= scored.current_N[scored.token_P]
    # Sequences that share a token have the same ids for it.
    token_T, first_T = np.unique(scored.token_P[known_P], return_index=True)
    trainer_TC = most_likely_tokens(trainer, hidden, scored.predictor_N[token_T], TOP)[0].numpy()
    top1, top20 = hits(scored.top_PC[known_P][first_T], trainer_TC)
    sums = {"top_tokens": float(len(token_T)), "top1": top1, "top20": top20}
    return {name: hidden.new_tensor(value, dtype=torch.float32) for name, value in sums.items()}


def row_shards(trainer: TrainerState) -> int:
    """In how many parts a row's tokens are split between the layers."""
    return trainer.parallel.context * (trainer.parallel.tensor if trainer.parallel.sequence_parallel else 1)


def logprobs_of_rows(trainer: TrainerState, work: Sequence[MicroBatch]) -> list[Tensor]:
    """Detached log-probabilities of each row's scored tokens under the present weights; empty on
    all stages but the last.
    """
    outputs: list[Tensor] = [torch.empty(0)] * len(work)

    def last(number: int, hidden: Tensor) -> None:
        scored = work[number].scored
        outputs[number] = head_outputs(trainer, hidden, scored.predictor_N, scored.target_N, scored.temperature_N)[
            0
        ].detach()

    forward_only(trainer.model, [w.row for w in work], last, row_shards(trainer))
    return outputs
