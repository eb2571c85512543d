"""The order to a stage's process, as JSON between the runner and the worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Device = Literal["cpu", "cuda"]


def _silent(line: str) -> None:
    """Progress that nobody reads."""


@dataclass(frozen=True)
class Request:
    """The input of every stage.

    base_model: a checkpoint folder.
    folder: the stage's own, for logs and whatever it keeps.
    family: key of the model's spec.
    dtype: float32 or bfloat16, of the stages with a server; None: the checkpoint's.
    parallel: sizes that `correctness` tries; none: its own list.
    prompts, tokens: sequences and tokens for each that the server samples.
    random: the model was made here, of random weights.
    run: a run's folder, whose last step is served as the run is.
    server_args: further arguments of vLLM's command line.
    say: progress, one line at a time.
    """

    base_model: Path
    folder: Path
    family: str
    device: Device = "cpu"
    seed: int = 0
    dtype: str | None = None
    parallel: dict[str, int] = field(default_factory=dict)
    prompts: int = 16
    tokens: int = 64
    run: Path | None = None
    random: bool = False
    server_args: tuple[str, ...] = ()
    say: Callable[[str], None] = _silent

    def as_json(self) -> dict[str, Any]:
        """Everything but `say`."""
        values = asdict(self)
        del values["say"]
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def request_from_json(raw: dict[str, Any], say: Callable[[str], None]) -> Request:
    """The inverse of `Request.as_json`."""
    paths = {name: Path(raw[name]) for name in ("base_model", "folder", "run") if raw[name] is not None}
    return Request(**{**raw, **paths, "server_args": tuple(raw["server_args"])}, say=say)
