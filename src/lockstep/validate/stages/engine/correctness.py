"""Stage correctness: every parallel layout against a single rank.

Log-probabilities and all gradients of one batch, then adapters and metrics of a whole training step
of two minibatches.
"""

from __future__ import annotations

from lockstep.config.megatron import Parallel
from lockstep.models.registry import load_model_config
from lockstep.validate.figures import NOT_PROVEN, Outcome, judged
from lockstep.validate.reference.layouts import (
    Question,
    answers_of,
    figures_of,
    layouts_for,
    too_few_gpus,
    write_oracle,
)
from lockstep.validate.reference.trainers import start_rank
from lockstep.validate.registry import stage_named
from lockstep.validate.request import Request


def run(request: Request) -> Outcome:
    """See the module."""
    start_rank(request.seed)
    config = load_model_config(str(request.base_model))
    layouts = layouts_for(config, request.parallel)
    largest = max(Parallel(**sizes).processes for sizes in layouts.values())
    if (missing := too_few_gpus(largest)) is not None:
        return Outcome(status=NOT_PROVEN, reason=missing)
    request.say("one rank")
    oracle = write_oracle(request)
    questions = [Question(name, sizes) for name, sizes in layouts.items()]
    request.say(f"{len(questions)} layouts")
    answers = answers_of(request, oracle, questions, stage_named("correctness").deadline_s)
    figures = [entry for name in layouts for entry in figures_of(name, answers[name])]
    return judged(figures, [f"layouts of {largest} processes: {'; '.join(layouts)}"])
