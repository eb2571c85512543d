"""`lockstep quickstart`: the example run, in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from lockstep.cli.base_models.exclusive import alone
from lockstep.cli.quickstart.examples import examples_folder, placed
from lockstep.cli.train import execute
from lockstep.errors import ConfigError
from lockstep.loop.run_file import load_run_file
from lockstep.process.scratch import make_folder
from lockstep.runs.store import published_steps


async def run_quickstart(path: Path, seed: int, fresh: bool, console: Console, real: bool = False) -> int:
    """Train a tiny Qwen3 on the yes/no/maybe example. Returns the exit code: 0 if the greedy reward
    reached its target.

    fresh: whatever an earlier quickstart left in the folder is deleted first.
    real: arithmetic on SmolLM2 instead.
    """
    from lockstep.cli.quickstart.real import train_real

    if real and not fresh:
        raise ConfigError("--real measures the rise from its own start: leave out --no-fresh")
    path = path.expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file: choose another --path")
    mark, lock = path / ".quickstart", path / ".quickstart.lock"
    ours = mark.exists() or not path.exists() or all(child.name.startswith(lock.name) for child in path.iterdir())
    if fresh and not ours:
        raise ConfigError(f"{path} holds something else than a quickstart: choose another --path or pass --no-fresh")
    make_folder(path, "--path")
    with alone(lock, f"{path} is in use by another quickstart"):
        if ours:  # what was here before a quickstart came with --no-fresh is never marked, and so never deleted
            mark.touch()
        if fresh:
            _say_what_is_deleted(path, console)
            _empty(path, keep=(mark, lock, lock.with_name(f"{lock.name}.owner")))
        if real:
            return await train_real(path, seed, console)
        config = examples_folder() / "yes_no_maybe" / "config.toml"
        return await execute(placed(load_run_file(config), path, seed), config, tiny=True, console=console)


def _say_what_is_deleted(folder: Path, console: Console) -> None:
    for run in sorted(file.parent for file in folder.glob("*/*/run.sqlite")):
        if steps := published_steps(run):
            said = f"deleting    {run}, which has step {steps[-1]}; --no-fresh would go on from there"
            console.print(said, markup=False, highlight=False, soft_wrap=True)


def _empty(folder: Path, keep: tuple[Path, ...]) -> None:
    for child in folder.iterdir():
        if child in keep:
            continue
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
