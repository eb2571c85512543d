"""A task's tiny base model: made once, taught the format by a few supervised steps, and kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from lockstep.cli.base_models.exclusive import alone
from lockstep.cli.tables.progress import progress
from lockstep.errors import ERROR, ConfigError, LockstepError
from lockstep.loop.run_file import RunFile
from lockstep.loop.task import Task, blamed
from lockstep.process.child import guarded
from lockstep.process.scratch import make_folder

_RECIPE = "warmup.json"
"""In a tiny base model's folder, once it is complete: what it was made from."""


_PARTS = {
    "tiny": "other [tiny] settings",
    "seed": "another seed",
    "demonstrations": "other demonstrations() than the task file's",
}
"""Parts of a recipe, and what is said where they differ."""


async def make_tiny(folder: Path, file: RunFile, task: Task, console: Console) -> Path:
    """Write the tiny base model and teach it the task's demonstrations; a folder that is complete
    already is kept.

    It is made under a name of its own and renamed. Raises ConfigError for a folder that holds
    something else.
    """
    make_folder(folder.parent, "[backend] path")
    shown = _demonstrations(file, task)
    recipe = _recipe(file, shown)
    with alone(folder.with_name(f".{folder.name}.lock"), f"{folder} is being made by another process"):
        if folder.exists():
            _check_recipe(folder, recipe)
            return folder
        making = folder.with_name(f".{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        with progress(console, "making a tiny model") as say:
            fields = [f"--set={name}={json.dumps(value)}" for name, value in file.tiny.config.items()]
            await _python(
                *("-m", "lockstep.cli.main", "tiny", file.tiny.family, str(making), "--seed", str(file.task.seed)),
                *fields,
            )
            if shown is not None and file.tiny.warmup_steps:
                demonstrations = making / "demonstrations.json"
                demonstrations.write_text(shown)
                say(f"teaching it to answer, {file.tiny.warmup_steps} supervised steps")
                await _python(
                    *("-m", "lockstep.cli.base_models.tiny_sft", str(making), str(demonstrations)),
                    *("--steps", str(file.tiny.warmup_steps), "--seed", str(file.task.seed)),
                    on_line=lambda line: say(f"teaching it to answer: step {line}"),
                )
        (making / _RECIPE).write_text(json.dumps(recipe))
        making.rename(folder)
    console.print(f"base model  {folder}", markup=False, highlight=False, soft_wrap=True)
    return folder


def check_tiny(folder: Path, file: RunFile, task: Task) -> None:
    """Raise ConfigError unless these settings and demonstrations made the tiny base model in this
    folder.
    """
    _check_recipe(folder, _recipe(file, _demonstrations(file, task)))


def _demonstrations(file: RunFile, task: Task) -> str | None:
    """What the task demonstrates with the run's seed, as JSON; None: nothing."""
    if task.demonstrations is None:
        return None
    with blamed(task.path, "demonstrations() failed"):
        return json.dumps(task.demonstrations(random.Random(file.task.seed)))


def _recipe(file: RunFile, shown: str | None) -> dict[str, Any]:
    digest = None if shown is None else hashlib.sha256(shown.encode()).hexdigest()
    return {"tiny": file.tiny.model_dump(mode="json"), "seed": file.task.seed, "demonstrations": digest}


def _check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    if not (folder / _RECIPE).is_file():
        raise ConfigError(f"{folder} is no tiny model made here: move it away, or change the model's name")
    made = json.loads((folder / _RECIPE).read_text())
    for part, said in _PARTS.items():
        if made.get(part) != recipe[part]:
            raise ConfigError(
                f"{folder} was made with {said}, and the run in {folder.name.removesuffix('-base')} trains it: delete both, or change "
                "the model's name"
            )


async def _python(*arguments: str, on_line=lambda line: None) -> None:
    """Run this Python in a process of its own, which may load torch, and raise with its last lines
    if it fails.
    """
    process = await asyncio.create_subprocess_exec(
        *guarded([sys.executable, *arguments]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    last: list[str] = []
    try:
        async for raw in process.stdout:
            last = [*last[-9:], raw.decode(errors="replace").rstrip()]
            on_line(last[-1])
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()  # the guard, which ends all that is below it
            await process.wait()
    if code and last and last[-1].startswith(ERROR):
        raise ConfigError(last[-1].removeprefix(ERROR))
    if code:
        raise LockstepError(f"making the tiny model failed (exit code {code}):\n" + "\n".join(last))
