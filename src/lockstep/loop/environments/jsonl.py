"""`environment = "jsonl:FILE"`: a file with one question a line, and a function of the user's that scores replies."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from lockstep.errors import ConfigError
from lockstep.loop.environments.options import ReplyOptions, options_of
from lockstep.loop.environments.questions import Question, Score, question_task
from lockstep.loop.task import Task, blamed, load_module

if TYPE_CHECKING:
    from lockstep.loop.run_file import TaskSection


class JsonlOptions(ReplyOptions):
    """[task.options] of a JSONL file."""

    score: str = Field(
        description="the scoring function, as FILE.py:NAME beside the config or MODULE:NAME; it gets the reply's text and the line"
    )
    held_out: int = Field(default=0, ge=0, description="lines at the end that are evaluated, and never trained on")


def task(name: str, section: TaskSection, folder: Path) -> Task:
    """The task of a file. Each line is an object with `prompt` (a text) or `messages`; `answer` is shown to a tiny model."""
    options = options_of(JsonlOptions, section)
    path = (folder / name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: [task] environment must be jsonl:FILE, relative to the config")
    lines = path.read_text(encoding="utf-8").splitlines()
    questions = [
        _question(line, f"{path}, line {number}", options.system_prompt)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    training = questions[: len(questions) - options.held_out]
    if not training:
        raise ConfigError(f"{path} has {len(questions)} questions, and held_out = {options.held_out}: none is left")
    score = _score(options.score, folder)
    return question_task(path, training, questions[len(training) :], score, options.reply_tokens)


def _question(line: str, where: str, instructions: str | None) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    given: Any = row if isinstance(row, dict) else {}
    messages = [{"role": "user", "content": given["prompt"]}] if isinstance(given.get("prompt"), str) else None
    if messages is None:
        messages = given.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ConfigError(f'{where} has no question: give {{"prompt": "..."}} or {{"messages": [...]}}')
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    answer = given.get("answer")
    return Question([*system, *messages], row, answer if isinstance(answer, str) else None)


def _score(given: str, folder: Path) -> Score:
    """The scoring function that the options name."""
    module_name, _, name = given.rpartition(":")
    if not module_name or not name:
        raise ConfigError(f"[task.options] score = {given!r}: name a function as FILE.py:NAME or MODULE:NAME")
    if module_name.endswith(".py"):
        module = load_module(folder / module_name, "scoring file")
    else:
        sys.path.insert(0, str(folder))
        with blamed(Path(module_name), "can't be imported"):
            module = importlib.import_module(module_name)
    score: Any = getattr(module, name, None)
    if not callable(score):
        raise ConfigError(f"[task.options] score = {given!r}: {module_name} has no function {name}")
    return cast(Score, score)
