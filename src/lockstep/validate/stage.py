"""The request and the result of a validation stage. The stages themselves are one module each.

`STAGES` is plain data: `lockstep validate MODEL --stages a,b` imports a stage's module and awaits
its `run`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lockstep.config.messages import unknown
from lockstep.errors import ConfigError
from lockstep.inference.launch import ServerConfig

STAGES: dict[str, str] = {
    "train_inf_mismatch": "what the trainer computes against what the server sampled from: base model and a random adapter",
}
"""Name (of the module beside this one) -> what it shows."""


@dataclass(frozen=True)
class Request:
    """The input of every stage. dtype None: the checkpoint's.

    folder: for logs and whatever the stage keeps.

    tokens: sampled per prompt.
    say: progress, one line at a time.
    server_args: further arguments of vLLM's command line.
    adapter: a PEFT folder; None: a random adapter.
    server: the settings that a run serves with; None: those that follow from the model.
    """

    base_model: str
    folder: Path
    seed: int = 0
    prompts: int = 16
    tokens: int = 64
    dtype: str | None = None
    say: Callable[[str], None] = print
    server_args: tuple[str, ...] = ()
    adapter: Path | None = None
    server: ServerConfig | None = None


@dataclass(frozen=True)
class Comparison:
    """One line of a stage's table: what was compared, for which policy, and the numbers by column."""

    policy: str
    compared: str
    values: dict[str, float]
    ok: bool | None = None
    """Within the stage's limits; None: there is no limit for this line."""


@dataclass(frozen=True)
class Report:
    """The result of a stage. `columns` names the values worth a column, in order, with their
    headings.
    """

    stage: str
    base_model: str
    dtype: str
    columns: dict[str, str]
    limits: str
    comparisons: list[Comparison] = field(default_factory=list)
    advice: str = ""
    """The next step of a user whose model is outside the limits."""

    @property
    def ok(self) -> bool:
        return all(row.ok is not False for row in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a stage that does not exist, or none at all."""
    if not names:
        raise ConfigError(f"--stages is empty: choose from {', '.join(STAGES)}")
    for name in names:
        if name not in STAGES:
            raise ConfigError(unknown(name, STAGES, "lockstep validate"))


async def run_stage(name: str, request: Request) -> Report:
    """Run one stage. Raises ConfigError for an unknown name, and whatever the stage raises."""
    check_names([name])
    return await importlib.import_module(f"lockstep.validate.stages.{name}").run(request)
