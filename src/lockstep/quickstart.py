"""What `lockstep quickstart` and `lockstep train` do: from a run's file to a trained model, with everything said on the way."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from lockstep.config import TrainConfig
from lockstep.errors import ConfigError, LockstepError
from lockstep.live import LiveTable
from lockstep.loop import Outcome, run
from lockstep.runfile import RunFile, load_run_file
from lockstep.task import Task, load_task


def examples_folder() -> Path:
    """The examples: beside the package in an installed wheel, at the top of a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_examples", package.parents[1] / "examples"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"the examples are missing beside {package}: install lockstep-rl again, or use a source checkout")


async def run_quickstart(path: Path, seed: int, fresh: bool, console: Console) -> int:
    """The yes/no/maybe example on a tiny Qwen3. Returns the exit code: 0 if the greedy reward reached its target."""
    if fresh and path.exists():
        if not (path / ".quickstart").exists() and any(path.iterdir()):
            raise ConfigError(
                f"{path} holds something else than a quickstart: choose another --path or pass --no-fresh"
            )
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / ".quickstart").touch()
    config = examples_folder() / "yes_no_maybe" / "config.toml"
    file = load_run_file(config)
    file = file.model_copy(
        update={
            "backend": file.backend.model_copy(update={"path": str(path)}),
            "task": file.task.model_copy(update={"seed": seed}),
        }
    )
    return await execute(file, config, tiny=True, console=console)


async def run_file(config: Path, tiny: bool, console: Console) -> int:
    """`lockstep train CONFIG`. Returns the exit code."""
    return await execute(load_run_file(config), config, tiny, console)


async def execute(file: RunFile, config: Path, tiny: bool, console: Console) -> int:
    """Prepare the model, start the backend, run the loop, and say where the result is."""
    started = time.monotonic()
    task = load_task(config.parent / file.task.file)
    base_model, settings = file.model.base_model, file.train
    if tiny:
        folder = Path(file.backend.path) / file.model.project / f"{file.model.name}-base"
        base_model = str(await make_tiny(folder, file, task, console))
        settings = TrainConfig(**settings.model_dump(exclude_unset=True) | file.tiny.train)
        if file.backend.tool_call_parser is None:  # the tiny tokenizer's template writes calls as JSON for every family
            file = file.model_copy(update={"backend": file.backend.model_copy(update={"tool_call_parser": "hermes"})})
    outcome, step_path = await _train(file, base_model, settings, task, console)
    seconds = time.monotonic() - started
    target = file.task.stop_at_reward
    if target is None:
        verdict = f"finished with greedy reward {outcome.greedy:.3f}"
    elif outcome.reached:
        verdict = f"greedy reward {outcome.greedy:.3f} reached {target} at step {outcome.step}"
    else:
        verdict = f"greedy reward {outcome.greedy:.3f} is below {target} after {outcome.step} steps"
    console.print(f"\n{verdict} ({seconds:.0f} s)", markup=False, highlight=False)
    trained = step_path / ("adapter" if file.model.lora else "model")
    console.print(f"checkpoint  {trained}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"chat        lockstep chat {step_path.parents[1]}", markup=False, highlight=False, soft_wrap=True)
    return 0 if target is None or outcome.reached else 3


async def _train(
    file: RunFile, base_model: str, settings: TrainConfig, task: Task, console: Console
) -> tuple[Outcome, Path]:
    from lockstep.backends.megatron import MegatronBackend
    from lockstep.model import TrainableModel

    model = TrainableModel(
        name=file.model.name, project=file.model.project, base_model=base_model, lora=file.model.lora
    )
    backend = MegatronBackend(
        **{name: getattr(file.backend, name) for name in type(file.backend).model_fields},
        seed=file.task.seed,
    )
    try:
        with console.status("starting") as status:
            backend.on_progress = status.update
            await model.register(backend)
            backend.on_progress = None
        run_path = backend.run_path(model)
        console.print(f"run         {run_path}", markup=False, highlight=False, soft_wrap=True)
        with LiveTable(console, f"{file.model.name} on {base_model}") as table:
            outcome = await run(model, backend, task, file.task, settings, run_path, table)
        return outcome, run_path / "steps" / f"{outcome.step:04d}"
    finally:
        await backend.close()


async def make_tiny(folder: Path, file: RunFile, task: Task, console: Console) -> Path:
    """Write the tiny base model and teach it the task's demonstrations; a folder that is complete already is kept."""
    done = folder / "warmup.json"
    recipe = {"tiny": file.tiny.model_dump(mode="json"), "seed": file.task.seed}
    if done.is_file():
        if json.loads(done.read_text()) != recipe:
            raise ConfigError(
                f"{folder} was made with other [tiny] settings or another seed: delete it, or change the model's name"
            )
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with console.status("making a tiny model") as status:
        overrides = json.dumps(file.tiny.config)
        write = (
            "import json, sys; from lockstep.families.tiny import write_tiny; family, folder, seed, fields = sys.argv[1:]; "
            "write_tiny(family, folder, seed=int(seed), overrides=json.loads(fields))"
        )
        await _python("-c", write, file.tiny.family, str(folder), str(file.task.seed), overrides)
        if task.demonstrations is not None and file.tiny.warmup_steps:
            shown = folder / "demonstrations.json"
            shown.write_text(json.dumps(task.demonstrations(random.Random(file.task.seed))))
            status.update(f"teaching it to answer, {file.tiny.warmup_steps} supervised steps")
            await _python(
                *("-m", "lockstep.warmup", str(folder), str(shown)),
                *("--steps", str(file.tiny.warmup_steps), "--seed", str(file.task.seed)),
                on_line=lambda line: status.update(f"teaching it to answer: step {line}"),
            )
    done.write_text(json.dumps(recipe))
    console.print(f"base model  {folder}", markup=False, highlight=False, soft_wrap=True)
    return folder


async def _python(*arguments: str, on_line=lambda line: None) -> None:
    """Run this Python in a process of its own (it may load torch; we don't) and raise with its last lines if it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
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
            process.kill()
            await process.wait()
    if code:
        raise LockstepError(f"making the tiny model failed (exit code {code}):\n" + "\n".join(last))
