"""The base of all settings, and TOML files that hold them."""

from __future__ import annotations

import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from lockstep.config.messages import describe
from lockstep.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)


_MOST_BYTES = 1 << 20
"""Of a file with settings."""
_building: ContextVar[bool] = ContextVar("lockstep_config_building", default=False)


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused, and every error one line (ConfigError)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _not_converted(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take "3" for 3 and true for 1. (Its strict mode would also refuse the
        lists and paths of a file.)
        """
        return _checked(value, _types(cls.model_fields[info.field_name].annotation)) if info.field_name else value

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n\n{settings_text(cls)}\n"

    def __init__(self, **settings: Any):
        if (
            _building.get()
        ):  # a part of a larger config: the outermost config raises, with the whole path of the setting
            super().__init__(**settings)
            return
        token = _building.set(True)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(describe(error, type(self), type(self).__name__)) from None
        finally:
            _building.reset(token)


def _types(annotation: Any) -> set[Any]:
    """The plain types below an annotation: {int, NoneType} of `int | None`, and likewise of
    `tuple[int, ...]`.
    """
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        parts = parts[:1]
    return set().union(*map(_types, parts)) if parts else {annotation}


def _checked(value: Any, types: set[Any]) -> Any:
    """value, if it is no text for a number, no number for a truth value, and no truth value for a
    number.
    """
    if isinstance(value, list | tuple):
        plain = {
            kind for kind in types if not isinstance(kind, str)
        }  # without the words that may stand in the list's place
        for entry in value if plain & {int, float, bool} else ():
            _checked(entry, plain)
    elif isinstance(value, str) and types <= {int, float, bool, type(None), ...}:
        what = "true or false" if bool in types else "a number"
        raise ValueError(f"must be {what}, not a text: write it without quotes")
    elif isinstance(value, bool) and types <= {int, float, type(None), ...}:
        raise ValueError("must be a number, not a truth value")
    elif isinstance(value, int) and not isinstance(value, bool) and types <= {bool, type(None)}:
        raise ValueError("must be true or false")
    return value


def settings_text(schema: type[BaseModel]) -> str:
    """Each setting with its default and its meaning, one a line, for `help()`."""
    lines = []
    for name, field in schema.model_fields.items():
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        lines.append(f"    {name} ({default}): {field.description or name.replace('_', ' ')}")
    return "\n".join(lines)


def unsupported(setting: str, value: object, backend: str, why: str) -> ConfigError:
    """The error for a valid setting that `backend` can't honour: `raise unsupported("loss", "gspo",
    "TinkerBackend", "...")`.
    """
    return ConfigError(f"{backend} does not support {setting} = {value!r}: {why}")


def load_toml(path: str | Path, schema: type[Schema]) -> Schema:
    """Read a TOML file into `schema`.

    Raises ConfigError, one line that names the file and the setting: file missing, not TOML,
    unknown key (with close matches), bad value.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"config file {path} has more than {_MOST_BYTES >> 20} MiB: give the path of a TOML file")
        data = tomllib.loads(content.decode())
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"config file {path} is a folder: give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not TOML: {error}") from None
    token = _building.set(True)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error, schema, str(path))) from None
    finally:
        _building.reset(token)
