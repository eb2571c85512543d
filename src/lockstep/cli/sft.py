"""`lockstep sft`: from a file of chats to a trained model, which `lockstep train` may go on with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lockstep.loop.run_file import SFTFile, load_sft_file
from lockstep.loop.sft import ChatData, run_sft
from lockstep.runs.checkpoint import file_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.backends.megatron.plan.resolve import Plan
    from lockstep.model import TrainableModel


async def sft_file(config: Path, console: Console, dry_run: bool = False) -> int:
    """`lockstep sft CONFIG`. Returns the exit code.

    dry_run: settings, rows and tokens are shown, and nothing is started.
    """
    from lockstep.cli.tables.settings_table import show_all, show_short

    file = load_sft_file(config)
    model, backend = _made(file)
    plan = await backend.resolve(model)
    data = _read(file, config, plan)
    steps = data.steps(file.sft)
    section = file.sft.over(steps)
    _say(console, f"{len(data.rows)} chats, {data.tokens} tokens, {data.scored} with loss: {steps} steps")
    for refused in data.refused:
        _say(console, f"left out: {refused}")
    if dry_run:
        show_all(console, plan, {"sft": section})
        return 0
    show_short(console, plan)
    backend.on_note = lambda note: None  # said already
    try:
        with console.status("starting") as status:
            backend.on_progress = lambda line: status.update(Text(line))
            await model.register(backend)
            backend.on_progress = None
        _say(console, f"run         {backend.run_path(model)}")

        def on_step(step: int, metrics: Mapping[str, float]) -> None:
            _say(
                console,
                f"step {step:>5} of {steps}  loss {metrics['loss']:.4f}  rate {metrics['learning_rate']:.2e}  "
                f"{metrics['tokens_per_second']:.0f} tokens/s",
            )

        await run_sft(model, backend, data, section, on_step)
        step_path = backend.run_path(model) / "steps" / f"{model.step:04d}"
        _say(console, f"checkpoint  {step_path / ('adapter' if file.model.lora else 'model')}")
        _say(console, f"chat        lockstep chat {step_path.parents[1]}")
    finally:
        await backend.close()
    return 0


def _read(file: SFTFile, config: Path, plan: Plan) -> ChatData:
    """The rows of the data file. Raises DataError that names lines which can't be trained on."""
    from lockstep.backends.megatron.packed_file import chat_format
    from lockstep.batching.chats import read_chats

    path = config.parent / file.sft.data
    resolved = plan.resolved
    longest = file.sft.row_length or resolved.max_model_len
    chats = read_chats(path, chat_format(resolved.base, resolved.server_args), file.sft.loss_on, longest)
    chats.check(file.sft.skip_bad_rows, str(path))
    return ChatData.of(chats, file_digest(path))


def _made(file: SFTFile) -> tuple[TrainableModel, MegatronBackend]:
    from lockstep.backends.megatron.backend import MegatronBackend
    from lockstep.model import TrainableModel

    model = TrainableModel(
        name=file.model.name, project=file.model.project, base_model=file.model.base_model, lora=file.model.lora
    )
    settings: dict[str, Any] = {name: getattr(file.backend, name) for name in file.backend.model_fields_set}
    return model, MegatronBackend(**settings, seed=file.seed)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
