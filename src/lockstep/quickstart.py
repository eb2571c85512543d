"""What `lockstep quickstart` and `lockstep train` do: from a run's file to a trained model, with everything said on the way."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console

from lockstep.config import TrainConfig
from lockstep.errors import ERROR, ConfigError, LockstepError, StoreError
from lockstep.live import LiveTable
from lockstep.loop import Outcome, run
from lockstep.process.child import guarded
from lockstep.runfile import RunFile, load_run_file
from lockstep.runs.store import published_steps
from lockstep.task import Task, load_task

if TYPE_CHECKING:
    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.model import TrainableModel

_RECIPE = "warmup.json"
"""In a tiny base model's folder, once it is complete: what it was made from."""


def examples_folder() -> Path:
    """The examples: beside the package in an installed wheel, at the top of a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_examples", package.parents[1] / "examples"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the examples are missing beside {package}: install lockstep-rl again, or use a source checkout")


async def run_quickstart(path: Path, seed: int, fresh: bool, console: Console, real: bool = False) -> int:
    """The yes/no/maybe example on a tiny Qwen3. Returns the exit code: 0 if the greedy reward reached its target.

    fresh: whatever an earlier quickstart left in the folder is deleted first. real: arithmetic on SmolLM2 instead.
    """
    from lockstep.real_quickstart import train_real

    if real and not fresh:
        raise ConfigError("--real measures the rise from its own start: leave out --no-fresh")
    path = path.expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file: choose another --path")
    mark, lock = path / ".quickstart", path / ".quickstart.lock"
    ours = mark.exists() or not path.exists() or all(child == lock for child in path.iterdir())
    if fresh and not ours:
        raise ConfigError(f"{path} holds something else than a quickstart: choose another --path or pass --no-fresh")
    path.mkdir(parents=True, exist_ok=True)
    with _alone(lock, f"{path} is in use by another quickstart"):
        if ours:  # what was here before a quickstart came with --no-fresh is never marked, and so never deleted
            mark.touch()
        if fresh:
            _empty(path, keep=(mark, lock))
        if real:
            return await train_real(path, seed, console)
        config = examples_folder() / "yes_no_maybe" / "config.toml"
        return await execute(placed(load_run_file(config), path, seed), config, tiny=True, console=console)


def placed(file: RunFile, path: Path, seed: int) -> RunFile:
    """The run in another folder and with another seed."""
    backend, task = file.backend.model_copy(update={"path": str(path)}), file.task.model_copy(update={"seed": seed})
    return file.model_copy(update={"backend": backend, "task": task})


@contextmanager
def _alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock file. Raises StoreError, which begins with `otherwise`, if another process does."""
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise StoreError(f"{otherwise}: wait for it, stop it, or choose another path or name") from None


def _empty(folder: Path, keep: tuple[Path, ...]) -> None:
    for child in folder.iterdir():
        if child in keep:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


async def run_file(config: Path, tiny: bool, console: Console, dry_run: bool = False) -> int:
    """`lockstep train CONFIG`. Returns the exit code. dry_run: every resolved setting is shown, and nothing is started."""
    file = load_run_file(config)
    return await (show_settings if dry_run else execute)(file, config, tiny, console)


async def show_settings(file: RunFile, config: Path, tiny: bool, console: Console) -> int:
    """Resolve and check all that `execute` would start, show it, and start nothing.

    A tiny model is made for it in a temporary folder, untaught, where the run has not made its own yet.
    """
    from lockstep.shown_settings import show_all

    task = load_task(config.parent / file.task.file)
    with tempfile.TemporaryDirectory(prefix="lockstep-dry-run-") as scratch:
        base_model, settings = file.model.base_model, file.train
        if tiny:
            folder = _tiny_folder(file)
            if not folder.exists():
                untaught = file.tiny.model_copy(update={"warmup_steps": 0})
                folder = Path(scratch) / folder.name
                await make_tiny(folder, file.model_copy(update={"tiny": untaught}), task, console)
            base_model, settings = str(folder), file.tiny_train_config()
            file = _as_tiny(file)
        model, backend = _made(file, base_model)
        show_all(console, await backend.resolve(model), file.task, settings)
    return 0


def _tiny_folder(file: RunFile) -> Path:
    # Absolute: it is part of what the run is, and chat may be called from elsewhere.
    return Path(file.backend.path).expanduser().resolve() / file.model.project / f"{file.model.name}-base"


def _as_tiny(file: RunFile) -> RunFile:
    """The file with what a tiny model needs: its template writes calls as JSON for every family."""
    if file.backend.tool_call_parser is not None:
        return file
    return file.model_copy(update={"backend": file.backend.model_copy(update={"tool_call_parser": "hermes"})})


async def execute(
    file: RunFile, config: Path, tiny: bool, console: Console, task: Task | None = None, rise: float | None = None
) -> int:
    """Prepare the model, start the backend, run the loop, and say where the result is.

    task: None loads the one that the file names. rise: see `loop.run`.
    """
    started = time.monotonic()
    task = task or load_task(config.parent / file.task.file)
    base_model, settings = file.model.base_model, file.train
    if tiny:
        base_model = str(await make_tiny(_tiny_folder(file), file, task, console))
        settings, file = file.tiny_train_config(), _as_tiny(file)
    outcome, step_path = await _train(file, base_model, settings, task, console, rise)
    seconds = time.monotonic() - started
    target = file.task.stop_at_reward
    if rise is not None:
        verdict = f"greedy reward {outcome.first:.3f} before, {outcome.greedy:.3f} after {outcome.step} steps"
    elif target is None:
        verdict = f"finished with greedy reward {outcome.greedy:.3f}"
    elif outcome.reached:
        verdict = f"greedy reward {outcome.greedy:.3f} reached {target} at step {outcome.step}"
    else:
        verdict = f"greedy reward {outcome.greedy:.3f} is below {target} after {outcome.step} steps"
    console.print(f"\n{verdict} ({seconds:.0f} s)", markup=False, highlight=False)
    trained = step_path / ("adapter" if file.model.lora else "model")
    console.print(f"checkpoint  {trained}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"chat        lockstep chat {step_path.parents[1]}", markup=False, highlight=False, soft_wrap=True)
    return 0 if (target is None and rise is None) or outcome.reached else 3


async def _train(
    file: RunFile, base_model: str, settings: TrainConfig, task: Task, console: Console, rise: float | None
) -> tuple[Outcome, Path]:
    from lockstep.shown_settings import show_short

    model, backend = _made(file, base_model)
    _check_not_past(file)
    show_short(console, await backend.resolve(model))
    backend.on_note = lambda note: None  # said already
    try:
        with console.status("starting") as status:
            backend.on_progress = status.update
            await model.register(backend)
            backend.on_progress = None
        run_path = backend.run_path(model)
        console.print(f"run         {run_path}", markup=False, highlight=False, soft_wrap=True)
        with LiveTable(console, f"{file.model.name} on {base_model}") as table:
            outcome = await run(model, backend, task, file.task, settings, run_path, table, rise)
        return outcome, run_path / "steps" / f"{outcome.step:04d}"
    finally:
        await backend.close()


def _made(file: RunFile, base_model: str) -> tuple[TrainableModel, MegatronBackend]:
    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.model import TrainableModel

    model = TrainableModel(
        name=file.model.name, project=file.model.project, base_model=base_model, lora=file.model.lora
    )
    settings = {name: getattr(file.backend, name) for name in type(file.backend).model_fields}
    return model, MegatronBackend(**settings, seed=file.task.seed)


def _check_not_past(file: RunFile) -> None:
    """Raise ConfigError for a run that has more steps than it is to have: it would start, evaluate and end."""
    path = Path(file.backend.path).expanduser() / file.model.project / file.model.name
    if (steps := published_steps(path)) and steps[-1] > file.task.steps:
        raise ConfigError(
            f"steps = {file.task.steps}: {path} has {steps[-1]} steps already; raise [task] steps to train on, or change the model's name"
        )


async def make_tiny(folder: Path, file: RunFile, task: Task, console: Console) -> Path:
    """Write the tiny base model and teach it the task's demonstrations; a folder that is complete already is kept.

    It is made under a name of its own and renamed. Raises ConfigError for a folder that holds something else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = {"tiny": file.tiny.model_dump(mode="json"), "seed": file.task.seed}
    with _alone(folder.with_name(f".{folder.name}.lock"), f"{folder} is being made by another process"):
        if folder.exists():
            _check_recipe(folder, recipe)
            return folder
        making = folder.with_name(f".{folder.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        with console.status("making a tiny model") as status:
            fields = [f"--set={name}={json.dumps(value)}" for name, value in file.tiny.config.items()]
            await _python(
                *("-m", "lockstep.cli", "tiny", file.tiny.family, str(making), "--seed", str(file.task.seed)), *fields
            )
            if task.demonstrations is not None and file.tiny.warmup_steps:
                shown = making / "demonstrations.json"
                shown.write_text(json.dumps(task.demonstrations(random.Random(file.task.seed))))
                status.update(f"teaching it to answer, {file.tiny.warmup_steps} supervised steps")
                await _python(
                    *("-m", "lockstep.warmup", str(making), str(shown)),
                    *("--steps", str(file.tiny.warmup_steps), "--seed", str(file.task.seed)),
                    on_line=lambda line: status.update(f"teaching it to answer: step {line}"),
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
    """Run this Python in a process of its own (it may load torch; we don't) and raise with its last lines if it fails."""
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
