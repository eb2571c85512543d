"""Errors a user can act on: one line that names the thing, what was expected, and the next step.

The command line prints these without a traceback and exits with `exit_code`; everything else is a
bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ERROR = "error: "
"""The beginning of the command line's one-line error."""


class LockstepError(Exception):
    """Base of every error that is the user's to fix."""

    exit_code = 1


class ConfigError(LockstepError):
    """A setting is unknown, out of range, or not supported by the backend it was given to."""

    exit_code = 2


class UnsupportedModelError(LockstepError):
    """No registered model family serves this base model."""

    exit_code = 2


class DataError(LockstepError):
    """Rollouts that can't be trained on: NaN rewards, no sampled token, a group of one, an empty
    batch.

    unusable: what is wrong with one trajectory ("stale", ...), which a step may do without; None
        where nothing may be left out.
    """

    def __init__(self, message: str, unusable: str | None = None):
        super().__init__(message)
        self.unusable = unusable


class StaleRolloutError(DataError):
    """A choice was sampled by a version that is unknown or older than `max_steps_off_policy`
    allows.
    """


class WeightsError(LockstepError):
    """Weights, adapters or routed experts that are missing, unknown, half-written or of the wrong
    shape.
    """


class StoreError(LockstepError):
    """A run's folder is damaged, locked by another process, or belongs to another model."""


class RuntimeNotInstalledError(LockstepError):
    """The isolated vLLM environment does not exist or is incomplete: run `lockstep runtime
    install`.
    """


class ServerError(LockstepError):
    """The inference server died, refused a request, or missed a deadline."""


class ServerLostError(ServerError):
    """The server ended itself or can't be trusted: it may hold a mixture of two versions. Restart
    it from the last published step.
    """


class TrainerError(LockstepError):
    """A trainer process died, raised, or missed a deadline."""


class TrainerLostError(TrainerError):
    """A trainer process ended, was stopped or stayed silent. A step starts the trainer anew, a few times."""


class MismatchError(LockstepError):
    """The server does not hold the policy that was trained: the probe's logprobs disagree."""


class RolloutError(LockstepError):
    """More rollouts failed than `max_exceptions` tolerates. `groups` keeps everything that finished
    (TrajectoryGroup list).
    """

    def __init__(self, message: str, groups: Sequence[Any] = ()):
        super().__init__(message)
        self.groups = list(groups)


def error_of(name: str, message: str, otherwise: LockstepError) -> LockstepError:
    """The error that another process described by the name of its class; `otherwise` for a name
    that is not a user's error.
    """
    return _BY_NAME[name](message) if name in _BY_NAME else otherwise


_BY_NAME: dict[str, type[LockstepError]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        DataError,
        MismatchError,
        ServerError,
        ServerLostError,
        StoreError,
        TrainerError,
        TrainerLostError,
        WeightsError,
    )
}
