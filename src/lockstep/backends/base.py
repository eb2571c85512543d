"""The interface of everything that trains and serves a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lockstep.errors import ConfigError

if TYPE_CHECKING:
    from lockstep.config.train import TrainConfig
    from lockstep.model import TrainableModel
    from lockstep.rollouts.trajectory import TrajectoryGroup


@dataclass(frozen=True)
class Endpoint:
    """The address of a served model: an OpenAI-compatible base URL (ending in `/v1`) and the run's
    bearer token.

    slots: sequences that the server takes at once; None: it does not say.
    max_model_len: tokens of its longest sequence; None likewise.
    seed: what the seeds of rollouts' requests follow from; None: requests get none.
    siblings: the server takes requests that differ in their seed alone as one.
    """

    base_url: str
    api_key: str = field(repr=False)
    slots: int | None = None
    max_model_len: int | None = None
    seed: int | None = None
    siblings: bool = False


@dataclass(frozen=True)
class TrainResult:
    """The result of a training step. `metrics` are plain floats; `checkpoint_path` is the immutable
    folder of the new step.
    """

    step: int
    metrics: dict[str, float]
    checkpoint_path: Path


class Backend(Protocol):
    """Trains and serves registered models. `train` publishes step N + 1 and returns once the server
    serves it.
    """

    async def register(self, model: TrainableModel) -> int:
        """Prepare `model` (start server and trainer, resume its last published step) and return
        that step.
        """
        ...

    def endpoint(self, model: TrainableModel) -> Endpoint: ...

    async def train(
        self, model: TrainableModel, groups: Sequence[TrajectoryGroup], config: TrainConfig | None = None
    ) -> TrainResult: ...

    def record(self, model: TrainableModel, metrics: Mapping[str, float]) -> None:
        """Keep metrics with those of the model's current step."""
        ...

    async def recover(self, model: TrainableModel) -> bool:
        """Serve the model again if its server was lost. Returns whether it was."""
        ...

    async def close(self) -> None: ...


def train_config(config: TrainConfig | None) -> TrainConfig:
    """The settings of a step, the defaults for None. Raises ConfigError for anything else, such as
    a dict.
    """
    from lockstep.config.train import TrainConfig

    if config is not None and not isinstance(config, TrainConfig):
        raise ConfigError(f"train takes a TrainConfig, not a {type(config).__name__}: write TrainConfig(**settings)")
    return config or TrainConfig()


def check_new(model: TrainableModel, registered: Iterable[TrainableModel]) -> None:
    """Raise ConfigError if a model with this project and name is registered."""
    if any((other.project, other.name) == (model.project, model.name) for other in registered):
        raise ConfigError(f"model {model.project}/{model.name} is registered already")
