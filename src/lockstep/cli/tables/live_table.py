"""The progress of a run: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lockstep.loop.synchronous import StepSummary

_COLUMNS = ("step", "reward", "greedy", "loss", "KL", "mismatch", "rollout s", "train s", "sync s")


def _cells(row: StepSummary) -> list[str]:
    def number(value: float, form: str) -> str:
        return "" if math.isnan(value) else format(value, form)

    return [
        str(row.step),
        number(row.reward, ".3f"),
        number(row.greedy, ".3f"),
        number(row.loss, "+.4f") if row.signal else "no signal",
        number(row.kl, ".1e"),
        number(row.mismatch, ".1e"),
        number(row.rollout_s, ".1f"),
        number(row.train_s, ".1f"),
        number(row.sync_s, ".1f"),
    ]


def _compiled(row: StepSummary) -> str:
    programs = "1 program" if row.compilations == 1 else f"{row.compilations} programs"
    return f"step {row.step} compiled {programs} in {row.compile_s:.1f} s"


class LiveTable:
    """Context manager; call it with each StepSummary. `reward` is that of a step's training
    rollouts, `greedy` that of the step itself.
    """

    def __init__(self, console: Console, title: str):
        self._console = console
        # A path may look like markup. Fits 80 columns: what does not fit would be cut off, without
        # a word.
        self._table = Table(title=Text(title), title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=0)
        for name in _COLUMNS:
            self._table.add_column(name, justify="right", min_width=7, no_wrap=True)
        self._live = Live(self._table, console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.start()
        else:
            self._line(_COLUMNS)
        return self

    def __call__(self, row: StepSummary) -> None:
        said = [*([_compiled(row)] if row.compilations else []), *row.failures]
        if self._live:
            self._table.add_row(*_cells(row))
            # Of the last step that had something to say.
            self._table.caption = Text("\n".join(said)) if said else self._table.caption
        else:
            self._line(_cells(row))
            for sentence in said:
                self._line([sentence])

    def _line(self, cells: Sequence[str]) -> None:
        text = "  ".join(f"{cell:>9}" for cell in cells)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
