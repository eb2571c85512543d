"""Stage resume: a step that is saved, loaded by another trainer and continued gives the bytes of
the run that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lockstep.engine.state import TrainerState, load_step, save_step
from lockstep.validate.figures import Figure, Outcome, count, judged
from lockstep.validate.reference.layout_problem import problem, stepped
from lockstep.validate.reference.trainers import adapter_trainer, start_rank, weights_trainer
from lockstep.validate.request import Request
from lockstep.validate.tolerances import limit_of


def run(request: Request) -> Outcome:
    """See the module."""
    start_rank(request.seed)
    request.say("adapters")
    figures = [measure("adapters", lambda: adapter_trainer(request.base_model, request.seed)[0], request)]
    request.say("all weights")
    figures.append(measure("all weights", lambda: weights_trainer(request.base_model), request))
    return judged(figures, ["two updates before, two after; weights, masters, moments and their count"])


def measure(name: str, make: Callable[[], TrainerState], request: Request) -> Figure:
    """Files that differ between an interrupted and an undisturbed run of two steps."""
    batch, _ = problem(request.seed)
    home = request.folder / name.replace(" ", "-")
    undisturbed = make()
    stepped(undisturbed, batch, request.seed)
    save_step(undisturbed, home / "first")
    stepped(undisturbed, batch, request.seed + 1)
    save_step(undisturbed, home / "second")
    resumed = make()
    load_step(resumed, home / "first")
    stepped(resumed, batch, request.seed + 1)
    save_step(resumed, home / "again")
    expected, answered = _contents(home / "second"), _contents(home / "again")
    wrong = sorted(file for file in expected | answered if expected.get(file) != answered.get(file))
    limit = limit_of("bytes that differ")
    return count(f"{name}: files that differ", len(wrong), limit, ", ".join(wrong), f"of {len(expected)}")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
