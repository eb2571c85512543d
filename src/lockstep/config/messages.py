"""A validation error as one line that names the setting."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import ValidationError

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""pydantic's words for a key that a model or a dataclass does not have."""
_ELSEWHERE = {
    "lr": "learning_rate",
    "batch_size": "groups_per_step",
    "num_generations": "group_size",
    "rollouts_per_group": "group_size",
    "beta": "kl_coef",
    "kl_beta": "kl_coef",
    "max_steps": "steps",
    "r": "rank",
    "lora_alpha": "alpha",
    "model": "base_model",
    "max_seq_length": "max_model_len",
    "loss_type": "loss",
    "advantage_normalization": "advantage",
    "adv_estimator": "advantage",
    "scale_rewards": "advantage",
    "importance_sampling_level": "importance_level",
    "entropy_coeff": "entropy_coef",
    "num_iterations": "epochs",
    "ppo_epochs": "epochs",
}
"""Names that other trainers give to settings of ours."""
_PLAIN_WORDS = {
    "tuple_type": "must be a list",
    "dict_type": "must be a table of settings",
    "model_type": "must be a table of settings",
    "model_attributes_type": "must be a table of settings",
}
"""For pydantic's messages that name Python's types: what the value has to be in a file or a call.
"""


def unknown(key: str, known: Iterable[str], where: str) -> str:
    """One line about a key that `where` does not have, with the closest ones it has."""
    known = sorted(known)
    if (ours := _ELSEWHERE.get(key)) in known:
        return f"{where} has no setting {key!r}: here it is {ours}"
    close = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(known)}"
    return f"{where} has no setting {key!r}: {hint}"


def describe(error: ValidationError, schema: type[Any], where: str) -> str:
    """The first problem of a pydantic ValidationError as one line that names the setting."""
    errors = error.errors(include_url=False)
    # A misspelt key also makes the right one "missing"; the misspelling is the problem to name.
    first = next((error for error in errors if error["type"] in _UNKNOWN), errors[0])
    location = [str(part) for part in first["loc"]]
    name = ".".join(location)
    if first["type"] in _UNKNOWN:
        parent = _schema_at(schema, location[:-1])
        if parent is not None:
            section = where if len(location) == 1 else f"{where} [{'.'.join(location[:-1])}]"
            return unknown(location[-1], parent.__pydantic_fields__, section)
    if first["type"] == "missing":
        return f"{where}: {name} is missing, it must be set"
    message = _PLAIN_WORDS.get(first["type"], first["msg"]).removeprefix("Value error, ")
    if not location:
        return f"{where}: {message}"
    return f"{where}: {name} = {first['input']!r}: {message[0].lower() + message[1:]}"


def _schema_at(schema: type[Any], location: list[str]) -> type[Any] | None:
    """The model or dataclass that a path of field names leads to; None if it leads elsewhere."""
    for part in location:
        field = schema.__pydantic_fields__.get(part)
        if field is None:
            return None
        candidates = [field.annotation, *get_args(field.annotation)]
        models = [c for c in candidates if hasattr(c, "__pydantic_fields__")]
        if not models:
            return None
        schema = models[0]
    return schema
