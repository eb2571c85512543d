"""What a planted fault is, and how an attribute is replaced while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from lockstep.models.config import ModelConfig

Plant = Callable[[Any], AbstractContextManager[None]]


def anywhere(_config: ModelConfig) -> bool:
    """True: the fault can be planted in every model."""
    return True


def moe(config: ModelConfig) -> bool:
    """True for a mixture of experts."""
    return config.is_moe


def hybrid(config: ModelConfig) -> bool:
    """True for a model with GatedDeltaNet layers."""
    return "linear_attention" in config.layer_types


@dataclass(frozen=True)
class Fault:
    """A fault that a stage must detect.

    stands_for: the mistake in a real program.
    stage: the name of the stage that must detect it.
    bench: the name of the live object that it is planted in (`benches.py`).
    plant: changes the live object while its block runs.
    fits: whether a model has the part that the fault is about.
    """

    name: str
    stands_for: str
    stage: str
    bench: str
    plant: Plant
    fits: Callable[[ModelConfig], bool] = anywhere


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` while the block runs; an instance that had none of its own loses it
    again.

    Raises AttributeError where nothing has that name: such a fault would change nothing.
    """
    getattr(owner, name)
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
