"""A user's task: scenarios, a rollout that earns a reward, and (for a tiny model) demonstrations of
the format.

A task is an ordinary Python file, which may import modules beside it, with these names at module
level:

    def scenarios() -> list                                            required; anything the rollout understands
    async def rollout(model, scenario, temperature) -> Trajectory      required; the same function trains and evaluates
    def evaluation_scenarios() -> list                                 optional; held out: evaluated, never trained on
    def demonstrations(rng) -> list[dict]                              optional; what `--tiny` learns first: {"messages", "tools"}
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import inspect
import random
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lockstep.errors import ConfigError, LockstepError
from lockstep.rollouts.failures import failure_of, one_line

if TYPE_CHECKING:
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import Trajectory


@dataclass(frozen=True)
class Task:
    """The checked definitions of a task file."""

    path: Path
    scenarios: list[Any]
    rollout: Callable[[TrainableModel, Any, float], Awaitable[Trajectory]]
    demonstrations: Callable[[random.Random], list[dict[str, Any]]] | None
    evaluation_scenarios: list[Any] = field(default_factory=list)
    """Empty: the training scenarios are evaluated."""

    def draw(self, count: int, seed: int, step: int) -> list[Any]:
        """The scenarios of one step, from epochs of a shuffled list. They depend on (seed, step)
        alone, so a resumed run keeps the order.
        """
        return [self.scenario(position, seed) for position in range(step * count, (step + 1) * count)]

    def scenario(self, position: int, seed: int) -> Any:
        """The scenario at a position of the run's endless list, which `draw` gives in parts."""
        epoch, offset = divmod(position, len(self.scenarios))
        return self.scenarios[_order(seed, epoch, len(self.scenarios))[offset]]

    async def attempt(self, model: TrainableModel, scenario: Any, temperature: float, limit_s: float) -> Trajectory:
        """A rollout with a time limit. Its own TimeoutErrors pass as they are."""
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                return await self.rollout(model, scenario, temperature)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TimeoutError(f"it took longer than {limit_s:g} s ([task] rollout_timeout_s)") from error


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, scenarios: int) -> list[int]:
    return random.Random(f"{seed}/{epoch}").sample(range(scenarios), scenarios)


def load_task(path: Path) -> Task:
    """Import a task file and check its names.

    Raises ConfigError naming what is missing, or the line of the file that raised.
    """
    module = load_module(path, "task file")
    path = Path(str(module.__file__))
    rollout = getattr(module, "rollout", None)
    if not inspect.iscoroutinefunction(rollout) or not _takes(rollout, 3):
        raise ConfigError(f"{path} must define `async def rollout(model, scenario, temperature) -> Trajectory`")
    scenarios = _listed(path, "scenarios", getattr(module, "scenarios", None))
    held_out: Any = getattr(module, "evaluation_scenarios", None)
    evaluated = [] if held_out is None else _listed(path, "evaluation_scenarios", held_out)
    return Task(path, scenarios, rollout, getattr(module, "demonstrations", None), evaluated)


def load_module(path: Path, what: str) -> ModuleType:
    """Import a Python file of the user's, which may import modules beside it.

    what: the file's kind, for messages.

    Raises ConfigError where it is missing, or with the line that raised.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{what} {path} does not exist: name a Python file, relative to the config")
    spec = importlib.util.spec_from_file_location(f"lockstep_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{what} {path} is not a Python file: its name must end in .py")
    if str(path.parent) not in sys.path:  # modules beside it, as when Python runs the file itself
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with blamed(path, "can't be imported"):
        spec.loader.exec_module(module)
    return module


def _listed(path: Path, name: str, make: Any) -> list[Any]:
    """The result of a task file's function of that name, as a list that isn't empty."""
    if not inspect.isfunction(make) or not _takes(make, 0):
        raise ConfigError(f"{path} must define `def {name}() -> list`")
    with blamed(path, f"{name}() failed"):
        made: Any = make()
        scenarios = list(made) if isinstance(made, Iterable) else None
    if scenarios is None:
        raise ConfigError(f"{path}: {name}() returned {type(made).__name__}, not a list")
    if not scenarios:
        raise ConfigError(f"{path}: {name}() returned an empty list, there is nothing to roll out")
    return scenarios


@contextmanager
def blamed(path: Path, what: str) -> Iterator[None]:
    """Turn an error of a task's code into one line that names the user's last frames.

    Errors that are meant for a user pass as they are.
    """
    try:
        yield
    except LockstepError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} {what}: {one_line(failure_of(error))}") from error


def _takes(function: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    return True
