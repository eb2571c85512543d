"""Stage sensitivity: faults that are planted must be detected by the measurement of their stage.

Each bench is measured without a fault first and last: a bench that fails then detects nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.models.registry import load_model_config
from lockstep.validate.faults.benches import BENCHES
from lockstep.validate.faults.fault import Fault
from lockstep.validate.faults.registry import FAULTS
from lockstep.validate.figures import Figure, Outcome, count, judged
from lockstep.validate.reference.layouts import Question, answers_of, figures_of, too_few_gpus, write_oracle
from lockstep.validate.reference.trainers import start_rank
from lockstep.validate.registry import stage_named
from lockstep.validate.request import Request

_DATA_PARALLEL = "data parallel"
_TWO = {"data": 2}


def run(request: Request) -> Outcome:
    """See the module."""
    start_rank(request.seed)
    config = load_model_config(str(request.base_model))
    fitting = [fault for fault in FAULTS if fault.fits(config)]
    figures: list[Figure] = []
    for bench in BENCHES:
        planted = [fault for fault in fitting if fault.bench == bench]
        if planted:
            figures += _in_process(request, bench, planted)
    missing = too_few_gpus(2)
    if missing is None:
        figures += _between_ranks(request, [fault for fault in fitting if fault.bench == _DATA_PARALLEL])
    else:
        fitting = [fault for fault in fitting if fault.bench != _DATA_PARALLEL]
    notes = [f"{len(fitting)} faults planted, {sum(entry.ok for entry in figures)} detections and clean benches"]
    notes += [f"{fault.name}: cannot be planted in this model" for fault in FAULTS if not fault.fits(config)]
    notes += [f"{fault.name}: {missing}" for fault in FAULTS if missing and fault.bench == _DATA_PARALLEL]
    notes += [f"{fault.name}: {fault.stands_for}; {fault.stage}" for fault in fitting]
    return judged(figures, notes)


def _in_process(request: Request, name: str, faults: Sequence[Fault]) -> list[Figure]:
    request.say(f"{name}: without a fault")
    bench = BENCHES[name](request)
    figures = [_clean(f"{name}, before", bench.measure())]
    for fault in faults:
        request.say(f"{name}: {fault.name}")
        try:
            with fault.plant(bench.live):
                measured = bench.measure()
        except Exception as error:  # noqa: BLE001 (a fault that is refused is detected)
            figures.append(count(f"undetected: {fault.name}", 0, where=f"{type(error).__name__}: {error}"[:200]))
            continue
        figures.append(_detected(fault, measured))
    return [*figures, _clean(f"{name}, after", bench.measure())]


def _between_ranks(request: Request, faults: Sequence[Fault]) -> list[Figure]:
    request.say(f"two ranks: {len(faults)} faults")
    oracle = write_oracle(request)
    questions = [Question(_DATA_PARALLEL, _TWO), *(Question(fault.name, _TWO, fault.name) for fault in faults)]
    answers = answers_of(request, oracle, questions, stage_named("sensitivity").deadline_s)
    figures = [_clean(_DATA_PARALLEL, figures_of(_DATA_PARALLEL, answers[_DATA_PARALLEL]))]
    return figures + [_detected(fault, figures_of(fault.name, answers[fault.name])) for fault in faults]


def _detected(fault: Fault, measured: Sequence[Figure]) -> Figure:
    """0 if a figure is outside its limit, and which is furthest out."""
    outside = [entry for entry in measured if not entry.ok]
    names = ", ".join(f"{entry.name} {entry.value:.2g}" for entry in outside[:3])
    return count(f"undetected: {fault.name}", 0 if outside else 1, where=names or f"{fault.stage} saw nothing")


def _clean(name: str, measured: Sequence[Figure]) -> Figure:
    outside = [entry for entry in measured if not entry.ok]
    place = f"{outside[0].name} {outside[0].value:.3g}" if outside else ""
    return count(f"figures outside without a fault: {name}", len(outside), where=place)
