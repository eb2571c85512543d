"""Stage dependency_resolution: installed versions against the floors of package and family."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from lockstep.errors import LockstepError
from lockstep.inference.environment.install import find_runtime
from lockstep.models.registry import get_model_support_spec_by_key
from lockstep.models.spec import DependencyFloor
from lockstep.validate.figures import Outcome, count, judged
from lockstep.validate.request import Request

_PACKAGE = "lockstep-rl"
_ROOT = Path(__file__).parents[5]
_SHOWN = ("lockstep-rl", "torch", "transformers", "megatron-core", "safetensors", "numpy")


def run(request: Request) -> Outcome:
    """See the module."""
    floors = [(f.distribution, f">={f.minimum}", f.reason) for f in _family_floors(request.family)]
    floors += [(r.name, str(r.specifier), _PACKAGE) for r in _requirements() if r.specifier]
    broken, compared = [], 0
    for distribution, wanted, reason in floors:
        installed = version_of(distribution)
        if installed is None:
            continue
        compared += 1
        if Version(installed) not in Requirement(f"x{wanted}").specifier:
            broken.append(f"{distribution} {installed} is installed, {reason} needs {wanted}")
    notes = [f"{name} {version_of(name) or 'not installed'}" for name in _SHOWN]
    figures = [
        count("versions outside their bounds", len(broken), where="; ".join(broken)),
        count("versions compared", compared, limit=None),
        count("server environments missing", _missing_runtime(request, notes)),
    ]
    return judged(figures, notes)


def _family_floors(family: str) -> Sequence[DependencyFloor]:
    return get_model_support_spec_by_key(family).dependency_floors


def _requirements() -> list[Requirement]:
    """Of the package: what applies here, with the extra for training."""
    try:
        lines = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    requirements = [Requirement(line) for line in lines]
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": "train"})]


def version_of(distribution: str) -> str | None:
    """None: not installed."""
    try:
        return importlib.metadata.version(re.sub(r"\[.*", "", distribution))
    except importlib.metadata.PackageNotFoundError:
        return None


def _missing_runtime(request: Request, notes: list[str]) -> int:
    try:
        runtime = find_runtime(request.device)
    except LockstepError as error:
        notes.append(str(error))
        return 1
    notes.append(f"server environment {runtime.kind}: {runtime.python}")
    return 0
