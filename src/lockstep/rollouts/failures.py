"""A rollout that raised, described by the line in the user's own code."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from lockstep.config.messages import describe
from lockstep.rollouts.trajectory import RolloutFailure, Trajectory

_FRAMES = 3
"""The user's last frames that an error names."""
_INSTALLED = tuple(
    f"{place}/"
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_path(name))
    for place in {path, str(Path(path).resolve())}
)


def failure_of(error: BaseException) -> RolloutFailure:
    """The exception as it is stored: type, message, the user's last frames, and the whole
    traceback.
    """
    text = "".join(traceback.format_exception(error))
    message = str(error)
    if isinstance(error, ValidationError) and error.title == Trajectory.__name__:
        message = describe(error, Trajectory, error.title)
    return RolloutFailure(type=type(error).__name__, message=message, where=user_frames(error), traceback=text)


def one_line(failure: RolloutFailure) -> str:
    """`KeyError: 'answer' (task.py:8 in rollout: return d['answer'])`."""
    said = " ".join(f"{failure.type}: {failure.message}".split())
    return f"{said} ({failure.where})" if failure.where else said


def user_frames(error: BaseException) -> str:
    """The last frames outside Lockstep and what is installed, outermost first: `task.py:8 in
    rollout: return d['answer'] > ...`.

    An error without such a frame (a deadline) has the place of its cause. Empty: no user's code was
    under way.
    """
    frames = [(frame, line) for frame, line in _frames(error) if _is_users(frame)][-_FRAMES:]
    if frames:
        return " > ".join(_shown(frame, line) for frame, line in frames)
    cause = error.__cause__ or error.__context__
    return user_frames(cause) if cause is not None else ""


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    if isinstance(error, SyntaxError):
        return
    yield from traceback.walk_tb(error.__traceback__)


def _is_users(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    if module.startswith("lockstep_task_"):  # the examples lie inside the installed package
        return True
    if module.partition(".")[0] == "lockstep" or frame.f_code.co_filename.startswith("<"):
        return False
    file = frame.f_code.co_filename
    # An installer may have linked a package there instead of copying the files.
    return not (file.startswith(_INSTALLED) or str(Path(file).resolve()).startswith(_INSTALLED))


def _shown(frame: FrameType, line: int) -> str:
    file = Path(frame.f_code.co_filename)
    name = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    source = linecache.getline(str(file), line).strip()
    return f"{name}:{line} in {frame.f_code.co_name}" + (f": {source}" if source else "")
