"""A task's tiny base model: made once, taught the format by a few supervised steps, and kept."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lockstep.cli.exclusive import alone
from lockstep.errors import ERROR, ConfigError, LockstepError
from lockstep.loop.run_file import RunFile
from lockstep.loop.task import Task
from lockstep.process.child import guarded

_RECIPE = "warmup.json"
"""In a tiny base model's folder, once it is complete: what it was made from."""


async def make_tiny(folder: Path, file: RunFile, task: Task, console: Console) -> Path:
    """Write the tiny base model and teach it the task's demonstrations; a folder that is complete
    already is kept.

    It is made under a name of its own and renamed. Raises ConfigError for a folder that holds
    something else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = {"tiny": file.tiny.model_dump(mode="json"), "seed": file.task.seed}
    with alone(folder.with_name(f".{folder.name}.lock"), f"{folder} is being made by another process"):
        if folder.exists():
            _check_recipe(folder, recipe)
            return folder
        making = folder.with_name(f".{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        with console.status("making a tiny model") as status:
            fields = [f"--set={name}={json.dumps(value)}" for name, value in file.tiny.config.items()]
            await _python(
                *("-m", "lockstep.cli.main", "tiny", file.tiny.family, str(making), "--seed", str(file.task.seed)),
                *fields,
            )
            if task.demonstrations is not None and file.tiny.warmup_steps:
                shown = making / "demonstrations.json"
                shown.write_text(json.dumps(task.demonstrations(random.Random(file.task.seed))))
                status.update(f"teaching it to answer, {file.tiny.warmup_steps} supervised steps")
                await _python(
                    *("-m", "lockstep.cli.tiny_sft", str(making), str(shown)),
                    *("--steps", str(file.tiny.warmup_steps), "--seed", str(file.task.seed)),
                    on_line=lambda line: status.update(Text(f"teaching it to answer: step {line}")),
                )
        (making / _RECIPE).write_text(json.dumps(recipe))
        making.rename(folder)
    console.print(f"base model  {folder}", markup=False, highlight=False, soft_wrap=True)
    return folder


def _check_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    if not (folder / _RECIPE).is_file():
        raise ConfigError(f"{folder} is no tiny model made here: move it away, or change the model's name")
    if json.loads((folder / _RECIPE).read_text()) != recipe:
        raise ConfigError(
            f"{folder} was made with other [tiny] settings or another seed: delete it, or change the model's name"
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
