"""`lockstep validate MODEL`: finds the model, runs the stages, and writes the report."""

from __future__ import annotations

import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lockstep.errors import ConfigError
from lockstep.inference.environment.locate import default_kind
from lockstep.inference.tokenizer_files import argument, check_server_args
from lockstep.models.registry import get_model_support_spec_by_key
from lockstep.validate.evidence import add_record
from lockstep.validate.figures import PASSED, Outcome
from lockstep.validate.page.page import write_page
from lockstep.validate.registry import StageSpec, selected
from lockstep.validate.request import Device, Request
from lockstep.validate.runner import Hooks, run_stages
from lockstep.validate.source import find_source
from lockstep.validate.summary import report_of, table, write_report

_SIZES = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert", "etp": "expert_tensor", "dp": "data"}
_SAMPLED: dict[Device, tuple[int, int]] = {"cpu": (8, 32), "cuda": (16, 64)}
"""Sequences for each policy, and tokens of each."""
_OF_A_RUN = ("train_inf_mismatch",)
"""What a run is checked for when no stage is named: its last step, as it is served."""


@dataclass(frozen=True)
class Options:
    """The command line's options, as the user gave them."""

    stages: Sequence[str] = ()
    skip: Sequence[str] = ()
    device: str | None = None
    parallel: Mapping[str, int] = field(default_factory=dict)
    layers: str = "all"
    report: Path = Path("validation")
    seed: int = 0
    prompts: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    stop: bool = False
    evidence: Path | None = None
    jobs: int = 1
    server_args: Sequence[str] = ()


def parse_parallel(text: str) -> dict[str, int]:
    """`tp=2,ep=2` as sizes by their full names. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.partition("=")
        if name not in _SIZES or not number.isdigit() or int(number) < 1:
            raise ConfigError(f"--parallel {part}: give sizes as tp=2,ep=2; the names are {', '.join(_SIZES)}")
        sizes[_SIZES[name]] = int(number)
    return sizes


def validate(model: str, options: Options, console: Console) -> int:
    """The exit code: 0 only if every selected stage passed.

    Raises ConfigError for an unknown stage or option, before anything starts, and what
    `find_source` raises.
    """
    stages = selected(options.stages, options.skip)
    check_server_args(options.server_args)
    device = _device(options.device)
    scratch = Path(tempfile.mkdtemp(prefix="lockstep-validate-"))
    failed = True
    try:
        with console.status("looking at the model") as status:
            say = lambda line: status.update(Text(line))  # noqa: E731
            source = find_source(model, options.layers, device, options.seed, scratch, say)
        if source.kind == "run" and not options.stages:
            stages = selected(_OF_A_RUN, options.skip)
        prompts, tokens = _SAMPLED[device]
        request = Request(
            source.folder, scratch / "stages", source.family, device, options.seed, options.dtype,
            dict(options.parallel), options.prompts or prompts, options.tokens or tokens, source.run, source.kind == "tiny",
            (*options.server_args, *_shared_gpu(device, options)),
        )  # fmt: skip
        moe = get_model_support_spec_by_key(source.family).is_moe
        outcomes = _run(stages, request, moe, options, console)
        report = report_of(source, request, outcomes, [stage.name for stage in stages], _command())
        failed = not report["passed"]
        path = write_report(report, options.report)
        page = write_page(report, options.report)
        console.print(table(report))
        if options.evidence is not None:
            kept = add_record(report, options.evidence)
            console.print(f"evidence: {kept}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"report: {path}, {page}", markup=False, highlight=False, soft_wrap=True)
        if failed:
            console.print(f"logs: {request.folder}", markup=False, highlight=False, soft_wrap=True)
        return 1 if failed else 0
    finally:
        if not failed:
            shutil.rmtree(scratch, ignore_errors=True)


def _shared_gpu(device: Device, options: Options) -> list[str]:
    """Arguments by which the servers of several stages fit on one GPU."""
    if device == "cpu" or options.jobs == 1 or argument(options.server_args, "gpu-memory-utilization") is not None:
        return []
    return ["--gpu-memory-utilization", f"{0.8 / options.jobs:.2f}", "--kv-cache-memory-bytes", str(2 * 2**30)]


def _run(
    stages: Sequence[StageSpec], request: Request, moe: bool, options: Options, console: Console
) -> dict[str, Outcome]:
    with console.status("") as status:

        def say(line: str) -> None:
            status.update(Text(line))

        def done(stage: StageSpec, outcome: Outcome) -> None:
            reason = "" if outcome.status == PASSED else f": {outcome.reason}"
            line = f"{stage.name}: {outcome.status}, {outcome.seconds:.0f} s{reason}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        return run_stages(stages, request, moe, Hooks(say, say, done), options.stop, options.jobs)


def _device(asked: str | None) -> Device:
    if asked not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {asked}: it is cpu or cuda")
    if asked == "cuda" and default_kind() != "cuda":
        raise ConfigError("--device cuda: this machine has no NVIDIA driver; leave it out, or say cpu")
    return "cuda" if "cuda" in (asked or default_kind()) else "cpu"


def _command() -> str:
    return shlex.join(["lockstep", *sys.argv[1:]])
