"""report.html: stages with their figures against limits, plots, versions; one file, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from lockstep.process.durable import write_whole
from lockstep.validate.figures import NOT_PROVEN
from lockstep.validate.page.plots import curves, parity, scatter
from lockstep.validate.page.style import STYLE
from lockstep.validate.summary import nearest, verdict
from lockstep.validate.tolerances import limit_of

PAGE = "report.html"


def write_page(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html beside report.json, all or nothing."""
    return write_whole(folder / PAGE, render(report))


def render(report: Mapping[str, Any]) -> str:
    """The page's text. Whatever comes from the model or the machine is escaped."""
    title = f"{report['model']}: {verdict(report)}"
    state = "complete" if report["complete"] else "partial" if report["passed"] else "failed"
    facts = {
        "family": report["family"],
        "layers": report["layers"],
        "device": report["device"],
        "seed": report["seed"],
        "date": report["date"],
        "command": report["command"],
    }
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(str(report['model']))}</h1><p class='verdict {state}'>{escape(verdict(report))}</p>"
        f"{_list(facts)}{_overview(report)}{''.join(map(_stage, report['stages']))}"
        f"<h2>Versions and machine</h2>{_list({**report['versions'], **_flat(report['machine'])})}</main></body></html>"
    )


def _list(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def _flat(machine: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in machine.items()}


def _overview(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><a href='#{escape(entry['name'])}'>{escape(entry['name'])}</a></td><td>{_badge(entry['status'])}</td>"
        f"<td class='number'>{entry['seconds'] or 0:.0f}</td>"
        f"<td>{escape(entry['reason'] or nearest(entry['figures']))}</td></tr>"
        for entry in report["stages"]
    )
    head = "<tr><th>stage</th><th></th><th class='number'>s</th><th>nearest to its limit</th></tr>"
    return f"<h2>Stages</h2><div class='scroll'><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


def _badge(status: str) -> str:
    kind = "open" if status == NOT_PROVEN else status.replace(" ", "-")
    return f"<span class='badge {escape(kind)}'>{escape(status)}</span>"


def _stage(entry: Mapping[str, Any]) -> str:
    if not entry["figures"] and not entry["notes"]:
        return f"<section id='{escape(entry['name'])}'></section>"
    figures = "".join(map(_figure, entry["figures"]))
    head = (
        "<tr><th>figure</th><th class='number'>mean</th><th class='number'>99th percentile</th>"
        "<th class='number'>largest</th><th class='number'>limit</th><th>where the largest is</th></tr>"
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in entry["notes"])
    opened = " open" if entry["status"] == "failed" else ""
    return (
        f"<section id='{escape(entry['name'])}'><h2>{escape(entry['name'])} {_badge(entry['status'])}</h2>"
        f"<p>{escape(entry['shows'])}</p>{_reason(entry)}{_plots(entry['plots'])}"
        f"<details{opened}><summary>{len(entry['figures'])} figures</summary><div class='scroll'><table>"
        f"<thead>{head}</thead><tbody>{figures}</tbody></table></div><ul>{notes}</ul></details></section>"
    )


def _reason(entry: Mapping[str, Any]) -> str:
    return f"<p class='reason'>{escape(entry['reason'])}</p>" if entry["reason"] else ""


def _figure(entry: Mapping[str, Any]) -> str:
    limit = "" if entry["limit"] is None else f"{entry['limit']:.3g} ({entry['limited']})"
    numbers = "".join(f"<td class='number'>{entry[name]:.3g}</td>" for name in ("mean", "p99", "largest"))
    unit = f" <small>{escape(entry['unit'])}</small>" if entry["unit"] else ""
    kind = "" if entry["ok"] else " class='outside'"
    return (
        f"<tr{kind}><td>{escape(entry['name'])}{unit}</td>{numbers}<td class='number'>{escape(limit)}</td>"
        f"<td>{escape(entry['where'])}</td></tr>"
    )


def _plots(plots: Mapping[str, Any]) -> str:
    drawn = ""
    if plots.get("parity per module"):
        drawn += parity(plots["parity per module"], limit_of("module outputs", "float32"))
    if plots.get("logprob scatter"):
        drawn += scatter(plots["logprob scatter"])
    if plots.get("reward"):
        drawn += curves(plots["reward"])
    return drawn
