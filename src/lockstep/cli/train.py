"""`lockstep train`: from a run's file to a trained model."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lockstep.cli.base_models.tiny_model import check_tiny, make_tiny
from lockstep.cli.tables.live_table import LiveTable
from lockstep.cli.tables.progress import progress
from lockstep.config.base import Config
from lockstep.config.train import TrainConfig
from lockstep.errors import ConfigError
from lockstep.loop.environments.find import task_of
from lockstep.loop.pipeline.trainer import PipelineTrainer, refuse_colocated
from lockstep.loop.run_file import RunFile, load_run_file
from lockstep.loop.synchronous import Outcome, run
from lockstep.loop.task import Task
from lockstep.runs.store import published_steps

if TYPE_CHECKING:
    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.model import TrainableModel


async def run_file(config: Path, tiny: bool, console: Console, dry_run: bool = False) -> int:
    """`lockstep train CONFIG`. Returns the exit code.

    dry_run: every resolved setting is shown, and nothing is started.
    """
    file = load_run_file(config)
    return await (show_settings if dry_run else execute)(file, config, tiny, console)


async def show_settings(file: RunFile, config: Path, tiny: bool, console: Console) -> int:
    """Resolve and check all that `execute` would start, show it, and start nothing.

    A tiny model is made for it in a temporary folder, untaught, where the run has not made its own
    yet.
    """
    from lockstep.cli.tables.settings_table import show_all

    task = task_of(file.task, config.parent)
    with tempfile.TemporaryDirectory(prefix="lockstep-dry-run-") as scratch:
        base_model, settings = file.model.base_model, file.train_config(tiny)
        if tiny:
            folder = _tiny_folder(file)
            if folder.exists():
                check_tiny(folder, file, task)
            else:
                untaught = file.tiny.model_copy(update={"warmup_steps": 0})
                folder = Path(scratch) / folder.name
                await make_tiny(folder, file.model_copy(update={"tiny": untaught}), task, console)
            base_model, file = str(folder), _as_tiny(file)
        model, backend = _made(file, base_model)
        _check_steps(file, settings)
        plan = await backend.resolve(model)
        refuse_colocated(file.mode == "pipeline" and plan.resolved.colocated)
        sections: dict[str, Config] = {"task": file.task, "train": settings}
        if file.mode == "pipeline":
            sections["pipeline"] = file.pipeline.resolved(settings.max_steps_off_policy, file.task.groups_per_step)
        show_all(console, plan, sections)
    return 0


def _tiny_folder(file: RunFile) -> Path:
    # Absolute: it is part of what the run is, and chat may be called from elsewhere.
    return file.backend.path.expanduser().resolve() / file.model.project / f"{file.model.name}-base"


def _as_tiny(file: RunFile) -> RunFile:
    """The file with what a tiny model needs: its template writes calls as JSON for every family."""
    if file.backend.tool_call_parser is not None:
        return file
    return file.model_copy(update={"backend": file.backend.model_copy(update={"tool_call_parser": "hermes"})})


async def execute(
    file: RunFile, config: Path, tiny: bool, console: Console, task: Task | None = None, rise: float | None = None
) -> int:
    """Prepare the model, start the backend, run the loop, and say where the result is.

    task: None loads the one that the file names.
    rise: see `loop.run`.
    """
    started = time.monotonic()
    task = task or task_of(file.task, config.parent)
    base_model, settings = file.model.base_model, file.train_config(tiny)
    if tiny:
        base_model = str(await make_tiny(_tiny_folder(file), file, task, console))
        file = _as_tiny(file)
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
    from lockstep.cli.tables.settings_table import show_short

    model, backend = _made(file, base_model)
    _check_steps(file, settings)
    plan = await backend.resolve(model)
    refuse_colocated(file.mode == "pipeline" and plan.resolved.colocated)
    show_short(console, plan)
    backend.on_note = lambda note: None  # said already
    try:
        with progress(console, "starting trainer and server") as backend.on_progress:
            await model.register(backend)
            backend.on_progress = None
        run_path, said = backend.run_path(model), ""
        console.print(f"run         {run_path}", markup=False, highlight=False, soft_wrap=True)
        with LiveTable(console, f"{file.model.name} on {base_model}") as table:
            if file.mode == "pipeline":
                outcome, said = await _pipelined(model, backend, file, settings, task, table, rise)
            else:
                outcome = await run(model, backend, task, file.task, settings, run_path, table, rise)
        console.print(said, markup=False, highlight=False, soft_wrap=True, end="")
        return outcome, run_path / "steps" / f"{outcome.step:04d}"
    finally:
        await backend.close()


async def _pipelined(
    model: TrainableModel,
    backend: MegatronBackend,
    file: RunFile,
    settings: TrainConfig,
    task: Task,
    table: LiveTable,
    rise: float | None,
) -> tuple[Outcome, str]:
    """The end of an asynchronous run, and a line about who waited for whom."""
    trainer = PipelineTrainer(
        model,
        backend,
        rollout=task.rollout,
        scenarios=task.scenarios,
        evaluation_scenarios=task.evaluation_scenarios,
        config=settings,
        pipeline=file.pipeline,
        on_step=table,
        rise=rise,
        **file.task.model_dump(exclude_unset=True),
    )
    return await trainer.run(), f"{trainer.advice}\n"


def _made(file: RunFile, base_model: str) -> tuple[TrainableModel, MegatronBackend]:
    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.model import TrainableModel

    model = TrainableModel(
        name=file.model.name, project=file.model.project, base_model=base_model, lora=file.model.lora
    )
    settings: dict[str, Any] = {name: getattr(file.backend, name) for name in file.backend.model_fields_set}
    return model, MegatronBackend(**settings, seed=file.task.seed)


def _check_steps(file: RunFile, settings: TrainConfig) -> None:
    """Raise ConfigError for a run that has more steps than asked for, or lacks its KL reference."""
    path = file.backend.path.expanduser() / file.model.project / file.model.name
    steps = published_steps(path)
    if steps and steps[-1] > file.task.steps:
        raise ConfigError(
            f"steps = {file.task.steps}: {path} has {steps[-1]} steps already; raise [task] steps to train on, or change the model's name"
        )
    reference = settings.kl_reference_step
    if reference is not None and reference not in (steps or [0]):
        has = f"it has {', '.join(map(str, steps))}" if steps else "a new run has step 0 alone"
        raise ConfigError(f"kl_reference_step = {reference} is no published step of {path}: {has}; choose one of those")
