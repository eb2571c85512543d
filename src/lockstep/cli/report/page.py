"""A run as one HTML page that needs nothing but itself: no network, no other file."""

from __future__ import annotations

import base64
import gzip
import json
import math
import time
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from lockstep.cli.report.mask import masked
from lockstep.cli.report.record import RunRecord, read_run
from lockstep.cli.report.token_text import TokenText
from lockstep.cli.report.transcripts import INDEX, KINDS, Transcripts, read_transcripts
from lockstep.metrics.names import METRICS, SECTIONS
from lockstep.process.durable import write_whole


def build_page(run: Path, live: bool = False) -> str:
    """The page of a run's folder.

    live: the page asks where it came from for newer ones (`lockstep view`).

    Raises StoreError for a folder that is no run.
    """
    record = read_run(run)
    text = TokenText(str(record.identity.get("base_model", "")))
    transcripts = read_transcripts(record.path, text)
    chunks = "".join(_chunk(number, chunk) for number, chunk in enumerate(transcripts.chunks))
    data = _script("data", "application/json", _json(_data(record, transcripts, text.known, live)))
    page = _asset("page.html")
    for name, value in (
        ("title", _escaped(record.name)),
        ("style", _asset("page.css")),
        ("chunks", chunks),
        ("data", data),
        ("program", _asset("charts.js") + _asset("page.js")),
    ):
        page = page.replace(f"<!-- {name} -->", value)
    return page


def write_page(run: Path, file: Path) -> RunRecord:
    """Write the page, all of it or nothing. Returns what it shows."""
    write_whole(file, build_page(run))
    return read_run(run)


def _data(record: RunRecord, transcripts: Transcripts, text_known: bool, live: bool) -> dict[str, Any]:
    steps = sorted(record.metrics)
    names = sorted({name for values in record.metrics.values() for name in values})
    return {
        "name": record.name,
        "identity": record.identity,
        "settings": record.settings,
        "made": time.time(),
        "live": live,
        "steps": steps,
        "published": [record.published_at.get(step) for step in steps],
        "metrics": {name: [_finite(record.metrics[step].get(name)) for step in steps] for name in names},
        "about": {name: [metric.unit, metric.section, metric.says] for name, metric in METRICS.items()},
        "sections": SECTIONS,
        "advice": [asdict(given) for given in record.advice],
        "jobs": [
            {"id": job.id, "state": job.state, "error": masked(f"{job.error_type}: {job.error}")}
            for job in record.jobs
            if job.state == "failed"
        ],
        "kinds": KINDS,
        "columns": INDEX,
        "index": transcripts.index,
        "failures": transcripts.failures,
        "damaged": transcripts.damaged,
        "experts_left_out": transcripts.experts_left_out,
        "text_known": text_known,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _chunk(number: int, chunk: list[dict[str, Any]]) -> str:
    packed = gzip.compress(json.dumps(chunk, ensure_ascii=False).encode(), 6, mtime=0)
    return _script(f"chunk-{number}", "text/plain", base64.b64encode(packed).decode())


def _script(identity: str, kind: str, text: str) -> str:
    return f'<script id="{identity}" type="{kind}">{text}</script>\n'


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _asset(name: str) -> str:
    return (files("lockstep.cli.report") / "assets" / name).read_text(encoding="utf-8")
