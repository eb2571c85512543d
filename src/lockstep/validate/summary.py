"""The report of a validation as data, as JSON, and in the terminal."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lockstep.process.durable import write_whole
from lockstep.validate.figures import FAILED, NOT_APPLICABLE, NOT_PROVEN, PASSED, Figure, Outcome
from lockstep.validate.registry import STAGES
from lockstep.validate.request import Request
from lockstep.validate.source import Source

REPORT = "report.json"
_PACKAGES = ("lockstep-rl", "torch", "transformers", "megatron-core", "numpy", "safetensors")


def report_of(
    source: Source, request: Request, outcomes: Mapping[str, Outcome], chosen: Sequence[str], command: str
) -> dict[str, Any]:
    """The report. It is complete only if every stage of the registry passed or does not apply."""
    stages = []
    for stage in STAGES:
        reason = "not selected" if stage.name not in chosen else "an earlier stage failed"
        outcome = outcomes.get(stage.name) or Outcome(status=NOT_PROVEN, reason=reason)
        entry = {"name": stage.name, "shows": stage.shows, "deadline_s": stage.deadline_s}
        stages.append(entry | outcome.as_json())
    statuses = {entry["status"] for entry in stages}
    own = [outcomes[name].status if name in outcomes else NOT_PROVEN for name in chosen]
    return {
        "model": source.model,
        "kind": source.kind,
        "family": source.family,
        "layers": source.layers,
        "device": request.device,
        "seed": request.seed,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": _machine(request.device),
        "versions": versions(),
        "passed": all(status in (PASSED, NOT_APPLICABLE) for status in own),
        "complete": statuses <= {PASSED, NOT_APPLICABLE},
        "stages": stages,
    }


def versions() -> dict[str, str]:
    """Of the installed packages that decide the figures."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def _machine(device: str) -> dict[str, Any]:
    machine: dict[str, Any] = {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()}
    if device == "cuda":
        import torch

        machine["gpus"] = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return machine


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.json, all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_whole(folder / REPORT, json.dumps(report, indent=1) + "\n")


_STYLES = {PASSED: "green", FAILED: "bold red", NOT_PROVEN: "yellow", NOT_APPLICABLE: "dim"}


def table(report: Mapping[str, Any]) -> Table:
    """One line for each stage, with the figure that is nearest to its limit."""
    shown = Table(
        title=Text(f"{report['model']} ({report['family']}, {report['layers']} layers, {report['device']})"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=Text(verdict(report)),
        caption_justify="left",
    )
    shown.add_column("stage", no_wrap=True)
    shown.add_column("", no_wrap=True)
    shown.add_column("s", justify="right", no_wrap=True)
    shown.add_column("nearest to its limit")
    for entry in report["stages"]:
        status = Text(entry["status"], style=_STYLES[entry["status"]])
        seconds = f"{entry['seconds']:.0f}" if entry["seconds"] else ""
        shown.add_row(entry["name"], status, seconds, Text(entry["reason"] or nearest(entry["figures"])))
    return shown


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence about the report as it is."""
    missing = [entry["name"] for entry in report["stages"] if entry["status"] == NOT_PROVEN]
    failed = [entry["name"] for entry in report["stages"] if entry["status"] == FAILED]
    if failed:
        return f"failed: {', '.join(failed)}"
    if missing:
        return f"partial: {len(missing)} stages are {NOT_PROVEN}"
    return "complete: every stage passed"


def nearest(figures: Sequence[Mapping[str, Any]]) -> str:
    """The figure that uses most of its limit."""
    limited = [_figure(entry) for entry in figures if entry["limit"] not in (None, 0, float("inf"))]
    if not limited:
        return f"{len(figures)} figures"
    closest = max(limited, key=lambda one_figure: one_figure.value / (one_figure.limit or 1))
    return f"{closest.name} {closest.value:.2g} of {closest.limit:.2g} {closest.unit}".rstrip()


def _figure(entry: Mapping[str, Any]) -> Figure:
    return Figure(**{name: value for name, value in entry.items() if name != "ok"})
