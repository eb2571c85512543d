"""What a stage measured: figures against limits, and the stage's outcome. Plain data, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Statistic = Literal["mean", "p99", "largest"]
Status = Literal["passed", "failed", "not proven", "not applicable"]
PASSED: Status = "passed"
FAILED: Status = "failed"
NOT_PROVEN: Status = "not proven"
NOT_APPLICABLE: Status = "not applicable"


@dataclass(frozen=True)
class Figure:
    """One measured quantity over tensors, modules or tokens.

    where: the name of the tensor, layer or token that has the largest value.
    limit: for the statistic `limited`; None: the figure is shown and has no limit.
    """

    name: str
    mean: float
    p99: float
    largest: float
    where: str = ""
    limit: float | None = None
    limited: Statistic = "largest"
    unit: str = ""

    @property
    def value(self) -> float:
        """The statistic that the limit is for."""
        return {"mean": self.mean, "p99": self.p99, "largest": self.largest}[self.limited]

    @property
    def ok(self) -> bool:
        """Within the limit; a value that is not a number is outside."""
        return self.limit is None or self.value <= self.limit

    def loosened(self, factor: float) -> Figure:
        """The same figure with a limit `factor` times as wide."""
        return self if self.limit is None else replace(self, limit=self.limit * factor)


def figure(
    name: str,
    values: Sequence[float],
    where: Callable[[int], str] | Sequence[str] = (),
    limit: float | None = None,
    limited: Statistic = "largest",
    unit: str = "",
) -> Figure:
    """A figure over `values`; `where` names the value at an index.

    Without values the figure is outside of every limit: nothing was measured.
    """
    import numpy as np

    array = np.asarray(values, np.float64)
    if array.size == 0:
        nothing = float("inf")
        return Figure(name, nothing, nothing, nothing, "nothing was measured", limit, limited, unit)
    index = int(np.argmax(np.where(np.isnan(array), np.inf, array)))
    place = where(index) if callable(where) else where[index] if where else ""
    largest = float(array[index])
    return Figure(name, float(array.mean()), float(np.percentile(array, 99)), largest, place, limit, limited, unit)


def count(name: str, value: float, limit: float | None = 0.0, where: str = "", unit: str = "") -> Figure:
    """A figure of one number: how many things are wrong."""
    return Figure(name, value, value, value, where, limit, "largest", unit)


@dataclass(frozen=True)
class Outcome:
    """The result of a stage, or of one that was not run.

    reason: why it failed, was not run, or does not apply; empty for a stage that passed.
    notes: facts about the model, one sentence each.
    plots: series for the report by plot name, as the report's page draws them.
    """

    figures: tuple[Figure, ...] = ()
    notes: tuple[str, ...] = ()
    reason: str = ""
    status: Status = PASSED
    seconds: float = 0.0
    plots: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"figures": [asdict(one_figure) | {"ok": one_figure.ok} for one_figure in self.figures]}


def judged(
    figures: Sequence[Figure], notes: Sequence[str] = (), plots: Mapping[str, Any] | None = None, reason: str = ""
) -> Outcome:
    """The outcome of a stage that ran: it failed if a figure is outside its limit, or a reason is
    given.
    """
    outside = [one_figure for one_figure in figures if not one_figure.ok]
    if outside and not reason:
        first = outside[0]
        place = f" at {first.where}" if first.where else ""
        reason = f"{first.name}: {first.value:.3g} > {first.limit:.3g} ({first.limited}){place}"
    status = FAILED if outside or reason or not figures else PASSED
    return Outcome(
        tuple(figures), tuple(notes), reason or ("" if figures else "nothing was measured"), status, 0.0, plots or {}
    )


def outcome_from_json(raw: Mapping[str, Any]) -> Outcome:
    """The inverse of `Outcome.as_json`."""
    figures = tuple(Figure(**{k: v for k, v in entry.items() if k != "ok"}) for entry in raw["figures"])
    return Outcome(**{**raw, "figures": figures, "notes": tuple(raw["notes"])})
