"""What is under way while a command waits: a line that changes in a terminal, lines of their own
elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

_EVERY_S = 10.0
"""Between two lines where no terminal shows them: a log stays short, and never looks dead."""


@contextmanager
def progress(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Says `what` is under way, then each line that is given to the function it yields."""
    if console.is_terminal:
        with console.status(Text(what)) as status:
            yield lambda line: status.update(Text(line))
        return
    due = 0.0

    def say(line: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + _EVERY_S
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(what)
    yield say
