"""The interface of a policy loss: a function of a row's pairs, and the settings that go with the
function. Imports no torch.

A *pair* is a sampled token with a sequence that owns the token. Siblings in a prefix tree may share
a computed token. A loss gives one value a pair, so k micro-batches on d ranks add up to exactly
what one big batch gives.

Shape suffixes: P pairs, Q sequences. All floats are in the dtype that came in (fp32 or fp64),
natural logs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """A row's pairs.

    new_P: log-probabilities of the policy that is trained, with gradient.
    old_P: what the importance ratio divides by: the server's, or the trainer's own before the step.
    sequence_P: int64, the sequence of each pair.
    advantage_Q: of each sequence.
    cost_P: what a KL penalty in the reward takes from each pair's advantage; None: nothing, or
        `advantage_Q` has it.
    """

    new_P: Tensor
    old_P: Tensor
    sequence_P: Tensor
    advantage_Q: Tensor
    cost_P: Tensor | None = None

    @property
    def advantage_P(self) -> Tensor:
        advantage_P = self.advantage_Q[self.sequence_P]
        return advantage_P if self.cost_P is None else advantage_P - self.cost_P


@dataclass(frozen=True)
class Clips:
    """Bounds of the importance ratio new/old, and a loss's further numbers.

    low, high: the ratio is clipped to this range.
    dual: the ratio above which a negative advantage's loss grows no more; inf: always grows.
    parameters: the loss's defaults (`PolicyLoss.parameters`), replaced by those that the user set.
    """

    low: float
    high: float
    dual: float
    parameters: Mapping[str, float] = field(default_factory=dict)


LossFunction = Callable[[LossInputs, Clips], "tuple[Tensor, Tensor]"]
"""(loss per pair, bool per pair: a clip bounded its weight or cut its gradient)."""


@dataclass(frozen=True)
class PolicyLoss:
    """A loss and the defaults of the settings that belong to it.

    clip: (clip_low, clip_high): the ratio is clipped below 1 - clip_low and above 1 + clip_high;
        None: the loss has no clip.
    dual_clip: default of clip_dual; None: the loss has no such clip.
    old_logprobs, token_normalization: defaults of these settings.
    by_sequence: ratios and advantages are those of whole sequences. Importance corrections are, too,
        by default.
    parameters: further numbers of the loss, with their defaults.
    """

    name: str
    function: LossFunction
    clip: tuple[float, float] | None = (1.0, float("inf"))
    dual_clip: float | None = None
    old_logprobs: Literal["sampling", "trainer"] = "sampling"
    token_normalization: Literal["token", "sequence"] = "token"
    by_sequence: bool = False
    parameters: Mapping[str, float] = field(default_factory=dict, hash=False)


def sum_by_sequence(values_P: Tensor, sequence_P: Tensor, sequences: int) -> Tensor:
    """[P] -> [Q]: the sum over each sequence's own tokens, shared or not."""
    return values_P.new_zeros(sequences).index_add(0, sequence_P, values_P)


def rest_of_sequence(values_P: Tensor, sequence_P: Tensor, sequences: int) -> Tensor:
    """[P] -> [P]: the sum over a pair and the later ones of its sequence. Pairs come sequence by
    sequence, each in the order of its tokens.
    """
    reached_P = values_P.cumsum(0)
    end_Q = sum_by_sequence(values_P, sequence_P, sequences).cumsum(0)
    return end_Q[sequence_P] - reached_P + values_P


def mean_by_sequence(values_P: Tensor, sequence_P: Tensor, sequences: int) -> Tensor:
    """[P] -> [Q]: the mean over each sequence's own tokens; 0 for a sequence without any."""
    counts_Q = sum_by_sequence(values_P.new_ones(values_P.shape), sequence_P, sequences)
    return sum_by_sequence(values_P, sequence_P, sequences) / counts_Q.clamp(min=1)
