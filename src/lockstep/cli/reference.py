"""The pages below docs/reference, made from the code: `python -m lockstep.cli.reference
docs/reference`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockstep import errors
from lockstep.config.base import Config
from lockstep.config.lora import LoraConfig
from lockstep.config.megatron import MegatronConfig, Parallel, Placement
from lockstep.config.pipeline import PipelineConfig
from lockstep.config.train import TrainConfig
from lockstep.loop.environments.harbor import HarborOptions
from lockstep.loop.environments.jsonl import JsonlOptions
from lockstep.loop.environments.reasoning_gym import ReasoningGymOptions
from lockstep.loop.environments.verifiers import VerifiersOptions
from lockstep.loop.run_file import ModelSection, RunFile, SFTSection, TaskSection, TinySection
from lockstep.metrics.names import METRICS, SECTIONS

_MADE = "Made by `make reference` from the code; a test compares the two.\n"


def configuration() -> str:
    """Every setting, by its table in a run's file."""
    tables: tuple[tuple[str, type[Config]], ...] = (
        ("At the top of the file", RunFile),
        ("[model]", ModelSection),
        ("[model] lora, `LoraConfig`", LoraConfig),
        ("[backend], `MegatronConfig`", MegatronConfig),
        ("[backend] placement, `Placement`", Placement),
        ("[backend] parallel, `Parallel`", Parallel),
        ("[task]", TaskSection),
        ("[task.options] of `reasoning_gym:`", ReasoningGymOptions),
        ("[task.options] of `jsonl:`", JsonlOptions),
        ("[task.options] of `verifiers:`", VerifiersOptions),
        ("[task.options] of `harbor:`", HarborOptions),
        ("[train], `TrainConfig`", TrainConfig),
        ("[sft], `SFTConfig` from learning_rate to seed", SFTSection),
        ("[pipeline], `PipelineConfig`", PipelineConfig),
        ("[tiny]", TinySection),
    )
    parts = ["# Settings\n", _MADE]
    for title, schema in tables:
        parts.append(f"\n## {title}\n\n| setting | default | meaning |\n|---|---|---|")
        for name, field in schema.model_fields.items():
            if schema is RunFile and name != "mode":  # the others are tables
                continue
            default = "required" if field.is_required() else _shown(field.get_default(call_default_factory=True))
            parts.append(f"| `{name}` | {default} | {_cell(field.description or 'a table of its own')} |")
    return "\n".join(parts) + "\n"


def metrics() -> str:
    """Every metric, by section."""
    parts = [
        "# Metrics\n",
        _MADE,
        "Read them with `RunStore.metrics()`, from the run's SQLite file (table `metrics`), or from its "
        "`metrics.jsonl`. [Sinks](../how-to/metrics.md) send them elsewhere.",
    ]
    for section, title in SECTIONS.items():
        parts.append(f"\n## {title}\n\n| metric | unit | meaning |\n|---|---|---|")
        rows = ((name, metric) for name, metric in METRICS.items() if metric.section == section)
        parts += [f"| `{name}` | {metric.unit} | {_cell(metric.says)} |" for name, metric in rows]
    return "\n".join(parts) + "\n"


def errors_page() -> str:
    """Every error that is the user's to fix, with the exit code of the command line."""
    kinds = [errors.LockstepError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    parts = ["# Errors\n", _MADE, "The command line prints each as one line.\n"]
    parts.append("| error | is a | exit code | meaning |\n|---|---|---|---|")
    for kind in kinds:
        says = " ".join((kind.__doc__ or "").split())
        parts.append(f"| `{kind.__name__}` | `{kind.__bases__[0].__name__}` | {kind.exit_code} | {_cell(says)} |")
    return "\n".join(parts) + "\n"


def command_line() -> str:
    """Every command with its arguments and options."""
    from typer.main import get_command

    from lockstep.cli.main import app

    parts = ["# Command line\n", _MADE]
    parts.append(
        "Exit codes: 0; 1 for an error; 2 for a wrong setting; 3 where a run ends below its `stop_at_reward`; 130 after Ctrl-C."
    )
    for name, command in _commands(get_command(app), ()):
        parts.append(f"\n## lockstep {name}\n\n{' '.join((command.help or '').split())}\n")
        rows = [_parameter(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            parts += ["| argument or option | default | meaning |\n|---|---|---|", *rows]
    return "\n".join(parts) + "\n"


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(name, command) of each that does something, groups left out."""
    for name, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from _commands(inner, (*path, name))
        else:
            yield " ".join((*path, name)), inner


def _parameter(parameter: Any) -> str:
    names = (
        ", ".join(f"`{name}`" for name in parameter.opts)
        if parameter.param_type_name == "option"
        else f"`{parameter.name.upper()}`"
    )
    default = "required" if parameter.required else _shown(parameter.default)
    return f"| {names} | {default} | {_cell(getattr(parameter, 'help', None) or '')} |"


PAGES = {"configuration.md": configuration, "metrics.md": metrics, "errors.md": errors_page, "cli.md": command_line}


def _shown(value: object) -> str:
    if value is None:
        return "not given"
    if isinstance(value, Config):
        return "each its own"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value if isinstance(value, str | int | float) else str(value)}`" if value not in ((), {}) else "empty"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
