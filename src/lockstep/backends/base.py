"""The interface of everything that trains and serves a model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lockstep.errors import ConfigError
from lockstep.rollouts.router import Replica

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
    colocated: the server sleeps while the trainer works.
    replicas: of several servers, all that serve now; requests go where a `Router` says. Empty for one.
    keeps_steps: an older step answers as it was, as long as a rollout holds it. False: the newest
        weights answer to its name.
    """

    base_url: str
    api_key: str = field(repr=False)
    slots: int | None = None
    max_model_len: int | None = None
    seed: int | None = None
    siblings: bool = False
    colocated: bool = False
    keeps_steps: bool = True
    replicas: tuple[Replica, ...] = field(default=(), compare=False)

    def served_by(self, replica: Replica) -> Endpoint:
        """The same model at one of its replicas."""
        return replace(self, base_url=replica.base_url, api_key=replica.api_key)


@dataclass(frozen=True)
class TrainResult:
    """The result of a training step. `metrics` are plain floats; `checkpoint_path` is the immutable
    folder of the new step.
    """

    step: int
    metrics: dict[str, float]
    checkpoint_path: Path


@dataclass(frozen=True)
class ServerLoad:
    """kv_use: share of the KV cache in use.
    preemptions: requests that were put off in the server's life, since the cache was full.
    """

    kv_use: float
    preemptions: float


Attach = Callable[[Path], Awaitable[Mapping[str, Any]]]
"""Called with a step's folder just before the step is published: it may add files, and returns the
caller's own state of the step, which is JSON.
"""


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
        self,
        model: TrainableModel,
        groups: Sequence[TrajectoryGroup],
        config: TrainConfig | None = None,
        attach: Attach | None = None,
    ) -> TrainResult: ...

    def record(self, model: TrainableModel, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep metrics with those of a step, the model's current one for None."""
        ...

    def run_path(self, model: TrainableModel) -> Path:
        """The model's folder."""
        ...

    async def problem(self, model: TrainableModel) -> str:
        """Why the model's server can't serve any more, in one line; empty for one that lives."""
        ...

    async def load(self, model: TrainableModel) -> ServerLoad | None:
        """How full the model's server is; None where it does not say."""
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
