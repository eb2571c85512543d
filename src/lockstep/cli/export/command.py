"""Write a run's step as a folder for other programs, checked, with a model card."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from lockstep.cli.export.card import model_card
from lockstep.cli.export.check import compare
from lockstep.cli.export.choose import chosen_step
from lockstep.cli.export.push import check_hub, push
from lockstep.cli.export.served import served_logprobs
from lockstep.cli.export.write import Exported, export_step
from lockstep.cli.score import Line, score
from lockstep.config.megatron import Parallel
from lockstep.errors import RuntimeNotInstalledError, ServerError, StoreError
from lockstep.runs.database import read_metrics
from lockstep.runs.retention import reading
from lockstep.runs.store import read_checkpoint


def export_run(
    run: Path, target: Path | None, step: str | None, merge: bool, push_to: str | None, console: Console
) -> None:
    """target: None writes below RUN/exports.
    push_to: a repository of the Hub.

    Raises StoreError for a folder that is no run or a step that is not published, ConfigError for a
    target that exists, MismatchError for an export that does not compute what the step does.
    """
    if push_to:
        check_hub(push_to)
    run = run.expanduser().resolve()
    identity, checkpoint = read_checkpoint(run, chosen_step(run, step))
    if identity.get("backend") == "tinker":
        raise StoreError(f"{run} was trained by TinkerBackend: its weights are with the service, not here")
    kind = "merged" if merge or identity["lora"] is None else "adapter"
    folder = target or run / "exports" / f"{run.name}-{checkpoint.number}-{kind}"
    name, metrics = f"{run.parent.name}/{run.name}", read_metrics(run).get(checkpoint.number, {})

    async def trainer_logprobs(model: str, ids: list[int], adapter: Path | None, dtype: str) -> list[float]:
        lines = [Line(id="text", tokens=ids)]
        (scored,) = await score(model, lines, adapter=adapter, parallel=Parallel(), packed=False, dtype=dtype)
        return scored.logprobs

    unserved: list[str] = []
    with reading(checkpoint), console.status(f"exporting step {checkpoint.number}") as status:

        async def served(written: Path, ids: list[int]) -> list[float]:
            try:
                return await served_logprobs(
                    run, checkpoint.number, written, ids, lambda line: status.update(Text(f"checking in vLLM: {line}"))
                )
            except (RuntimeNotInstalledError, ServerError) as error:
                unserved.append(str(error).split("\n")[0])
                raise

        exported = export_step(
            checkpoint,
            identity,
            merge,
            folder,
            check=lambda written: compare(written, checkpoint, identity, trainer_logprobs, served),
            card=lambda kind, differences: model_card(name, checkpoint.number, identity, metrics, kind, differences),
        )
        pushed = push(exported.folder, push_to) if push_to else None
    for line in _summary(exported, pushed, unserved):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _summary(exported: Exported, pushed: str | None, unserved: list[str]) -> list[str]:
    size = sum(file.stat().st_size for file in exported.folder.rglob("*") if file.is_file())
    measured = exported.differences
    lines = [
        f"{exported.folder}  step {exported.step}, {exported.kind}, {size / 1e6:.0f} MB",
        f"checked     transformers against the trainer: {measured['mean']:.1e} nats per token",
        f"checked     vLLM against the trainer: {measured['served_mean']:.1e} nats per token"
        if "served_mean" in measured
        else f"not checked in vLLM: {''.join(unserved)}",
    ]
    return [*lines, f"pushed      {pushed}"] if pushed else lines
