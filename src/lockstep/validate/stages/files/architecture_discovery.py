"""Stage architecture_discovery: the layers of the model, and the config's fields that nobody read."""

from __future__ import annotations

from lockstep.models.discovery import inspect_architecture
from lockstep.models.registry import load_model_config
from lockstep.validate.figures import Outcome, count, judged
from lockstep.validate.request import Request


def run(request: Request) -> Outcome:
    """See the module."""
    report, config = inspect_architecture(str(request.base_model)), load_model_config(str(request.base_model))
    notes = [f"{f.count} layers of kind {f.key}, the first is layer {f.first_layer}" for f in report.layer_families]
    notes.append(f"the fewest leading layers with every kind: {report.minimum_layers}")
    unread = config.unknown_fields
    risks = [risk for risk in report.unresolved_risks if "config field" not in risk]
    figures = [
        count("config fields that nobody reads", len(unread), where=", ".join(unread)),
        count("open risks", len(risks), where="; ".join(risks)),
        count("kinds of layers", len(report.layer_families), limit=None),
    ]
    return judged(figures, notes)
