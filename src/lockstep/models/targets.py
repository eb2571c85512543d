"""LoRA targets: which a model has, and whether the ones a user asked for are among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lockstep.errors import ConfigError
from lockstep.models.contract import LoraSite, Shard
from lockstep.models.spec import ModelSupportSpec


def available_targets(shards: Iterable[Shard]) -> tuple[str, ...]:
    """Every LoRA target that the shards of a whole model have, sorted."""
    return tuple(sorted({site.target for shard in shards for site in shard.sites}))


def check_targets(spec: ModelSupportSpec, shards: Sequence[Shard], targets: Sequence[str] | None) -> tuple[str, ...]:
    """The targets to train: the ones asked for, or the family's default as far as this model has
    them.

    shards: of the whole model.

    Raises ConfigError for a target that no module of the model carries, an empty list or a
    repetition.
    """
    available = available_targets(shards)
    if targets is None:
        return tuple(t for t in spec.default_target_modules if t in available)
    unknown = [t for t in targets if t not in available]
    if unknown or not targets or len(set(targets)) != len(targets):
        wrong = f"{unknown[0]!r} is no LoRA target" if unknown else f"{list(targets)} is empty or repeats a target"
        raise ConfigError(f"target_modules: {wrong} of this {spec.key} model; choose from {', '.join(available)}")
    return tuple(targets)


def lora_sites(shards: Iterable[Shard], targets: Sequence[str]) -> list[LoraSite]:
    """The low-rank pairs of these targets, in the order of the shards."""
    return [site for shard in shards for site in shard.sites if site.target in targets]
