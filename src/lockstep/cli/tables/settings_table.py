"""The settings of a run, for a person to read: a few lines at its start, all of them for `lockstep
train --dry-run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from lockstep.backends.megatron.plan.resolve import Setting
from lockstep.config.train import TrainConfig
from lockstep.errors import RuntimeNotInstalledError
from lockstep.inference.environment.install import find_runtime

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from rich.console import Console

    from lockstep.backends.megatron.plan.resolve import Plan
    from lockstep.config.base import Config

_MODEL = ("base_model", "family", "lora")
"""Settings whose names begin so belong to the config file's [model]."""
_SHORT = ("dtype", "placement.trainer", "placement.inference", "max_model_len", "max_num_seqs", "tool_call_parser")


def show_short(console: Console, plan: Plan) -> None:
    """The defaults that were chosen here, each with its reason, and the notes."""
    for setting in plan.settings:
        if setting.name in _SHORT and setting.why != "set":
            _line(console, f"{setting.name:<20}{setting.text} ({setting.why})")
    show_notes(console, plan)


def show_notes(console: Console, plan: Plan) -> None:
    for note in plan.notes:
        _line(console, f"note: {note}")


def show_all(console: Console, plan: Plan, sections: Mapping[str, Config]) -> None:
    """Every setting of a run in one table: its name as the config file spells it, its value, and
    who decided.

    sections: those of the file beside [model] and [backend], by name.
    """
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold", ratio=2)
    table.add_column("why", overflow="fold", ratio=3)
    of_model = [setting for setting in plan.settings if setting.name.startswith(_MODEL)]
    of_backend = [setting for setting in plan.settings if not setting.name.startswith(_MODEL)]
    for section, settings in (
        ("model", of_model),
        ("backend", [*of_backend, _runtime(plan)]),
        *((name, _fields(section)) for name, section in sections.items()),
    ):
        table.add_row(escape(f"[{section}]"), style="bold")
        for setting in settings:
            table.add_row(f"  {setting.name}", escape(setting.text), escape(setting.why))
    console.print(table)
    show_notes(console, plan)


def _fields(config: Config) -> Iterable[Setting]:
    given = config.model_fields_set
    settings = [
        Setting(name, getattr(config, name), "set" if name in given else "default")
        for name in type(config).model_fields
    ]
    if isinstance(config, TrainConfig):
        settings.append(Setting("clip range", list(config.clip_range), "follows from loss, clip_low and clip_high"))
    return settings


def _runtime(plan: Plan) -> Setting:
    kind = plan.resolved.devices.kind
    try:
        return Setting("runtime", str(find_runtime(kind).python), f"the server's environment for {kind}")
    except RuntimeNotInstalledError as error:
        return Setting("runtime", None, str(error))


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
