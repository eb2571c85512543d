"""What a run's file says to an environment: the table [task.options]."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from lockstep.config.base import Config
from lockstep.errors import ConfigError

if TYPE_CHECKING:
    from lockstep.loop.run_file import TaskSection

Options = TypeVar("Options", bound=Config)


class ReplyOptions(Config):
    """What every environment of questions takes."""

    reply_tokens: int = Field(default=512, gt=0, description="tokens of a reply, at most")
    system_prompt: str | None = Field(default=None, description="instructions before each question")


def options_of(schema: type[Options], section: TaskSection) -> Options:
    """[task.options], checked. Raises ConfigError naming the setting."""
    try:
        return schema(**section.options)
    except ConfigError as error:
        raise ConfigError(str(error).replace(schema.__name__, "[task.options]", 1)) from None
