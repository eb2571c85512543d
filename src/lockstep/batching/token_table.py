"""What a training step saw in every token that it was trained on: one Parquet file a step, for
whoever looks at the run.

A row is a sequence: its group and trajectory, and for each scored token the position in the
sequence, the id and the trainer's log-probability before the step.

Shape suffixes: R rows, S row length, Q sequences, P pairs (sequence, scored token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.errors import StoreError
from lockstep.process.durable import replacing

if TYPE_CHECKING:
    from lockstep.batching.packed_batch import PackedBatch
    from lockstep.batching.prefix_tree import TokenSequence


@dataclass(frozen=True)
class TokenTable:
    """The scored tokens of a packed batch, without the batch's bulk."""

    group_Q: list[int]
    trajectory_Q: list[int]
    advantage_Q: np.ndarray  # float32
    row_Q: np.ndarray
    offsets_Q: np.ndarray  # [Q + 1]
    index_P: np.ndarray  # row index
    position_P: np.ndarray  # in the sequence
    token_P: np.ndarray  # id

    @classmethod
    def of(cls, batch: PackedBatch, packed: Sequence[TokenSequence]) -> TokenTable:
        """packed: the batch's sequences in its order."""
        rows_P = np.repeat(batch.row_Q, np.diff(batch.scored_offsets_Q))
        return cls(
            group_Q=[sequence.group for sequence in packed],
            trajectory_Q=[sequence.trajectory for sequence in packed],
            advantage_Q=batch.sequence_advantage_Q,
            row_Q=batch.row_Q,
            offsets_Q=batch.scored_offsets_Q,
            index_P=batch.scored_index_P,
            position_P=batch.positions_RS[rows_P, batch.scored_index_P],
            token_P=batch.tokens_RS[rows_P, batch.scored_index_P],
        )

    def write(self, file: Path, logprobs_RS: np.ndarray | None) -> None:
        """Under a temporary name, then renamed. Missing folders are made.

        logprobs_RS: the trainer's, as `trained_logprobs` returns them; None for a step that
            computed nothing.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows_P = np.repeat(self.row_Q, np.diff(self.offsets_Q))
        logprob_P = (
            np.full(len(rows_P), np.nan, np.float32) if logprobs_RS is None else logprobs_RS[rows_P, self.index_P]
        )

        def lists(values_P: np.ndarray) -> pa.ListArray:
            return pa.ListArray.from_arrays(pa.array(self.offsets_Q.astype(np.int32)), pa.array(values_P))

        table = pa.table(
            {
                "group": pa.array(self.group_Q, pa.int32()),
                "trajectory": pa.array(self.trajectory_Q, pa.int32()),
                "advantage": pa.array(self.advantage_Q.astype(np.float32)),
                "positions": lists(self.position_P.astype(np.int32)),
                "token_ids": lists(self.token_P.astype(np.int32)),
                "logprobs": lists(logprob_P.astype(np.float32)),
            }
        )
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(file) as temporary:
            pq.write_table(table, temporary, compression="zstd")


@dataclass(frozen=True)
class TrainedSequence:
    """One row of the file. logprobs_P: NaN for a sequence that was not computed."""

    group: int
    trajectory: int
    advantage: float
    positions_P: np.ndarray
    token_ids_P: np.ndarray
    logprobs_P: np.ndarray


def read_token_table(file: Path) -> list[TrainedSequence]:
    """The sequences in the order in which they were packed. Raises StoreError for a missing or
    damaged file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
        return [
            TrainedSequence(
                row["group"],
                row["trajectory"],
                row["advantage"],
                np.array(row["positions"], np.int64),
                np.array(row["token_ids"], np.int64),
                np.array(row["logprobs"], np.float32),
            )
            for row in rows
        ]
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise StoreError(f"{file} is not a readable table of trained tokens: {error}") from None
