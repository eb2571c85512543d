"""The commands about a run that exists, and about the machine: plain functions that `main` makes
commands of.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

RunFolder = Annotated[Path, typer.Argument(help="folder of a run: PATH/PROJECT/NAME", show_default=False)]
Step = Annotated[
    str | None, typer.Option("--step", help="a published step, or best; the last one if not given", show_default=False)
]


def report(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the page; RUN/report.html if not given", show_default=False)
    ] = None,
) -> None:
    """Write one HTML page about a run that opens anywhere: curves, groups, transcripts with every
    token's log-probabilities, and advice where the run is ill.
    """
    from lockstep.cli.report.terminal import write_report

    write_report(run, output, Console())


def view(
    run: RunFolder, port: Annotated[int, typer.Option(min=0, max=65535, help="on loopback; 0: any free one")] = 0
) -> None:
    """Serve the report of a run on loopback behind a token, and keep it up to date."""
    from lockstep.cli.report.live import serve_page

    asyncio.run(serve_page(run, port, lambda url: Console().print(url, markup=False, highlight=False, soft_wrap=True)))


def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option("--once", help="print the table and leave")] = False,
) -> None:
    """Follow a run in the terminal: its newest steps, and advice where it is ill."""
    from lockstep.cli.report.terminal import watch_run

    watch_run(run, once, Console())


def trace(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the file; RUN/trace.json if not given", show_default=False)
    ] = None,
) -> None:
    """Write when rollouts, training, syncs and evaluations of a run happened, for Perfetto."""
    from lockstep.cli.report.trace import write_trace

    write_trace(run, output, Console())


def export(
    run: RunFolder,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="a new folder; below RUN/exports if not given", show_default=False),
    ] = None,
    step: Step = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="the whole model, the adapter merged into its weights")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            "--push",
            metavar="USER/NAME",
            help="also upload it to the Hugging Face Hub, there private",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a step as a folder for transformers and vLLM: a PEFT adapter, or the whole model. Both
    load the folder, and are compared with the step, before it appears.
    """
    from lockstep.cli.export.command import export_run

    export_run(run, output, step, merged, push, Console())


def serve(run: RunFolder, step: Step = None) -> None:
    """Serve a step as an OpenAI endpoint on loopback until Ctrl-C."""
    from lockstep.cli.export.serve import serve_run

    asyncio.run(serve_run(run, step, Console()))


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="one JSON object: findings, and facts about the machine")
    ] = False,
) -> None:
    """Look at this machine: what is here, what would stop a run, and the remedy for each.

    Exits with 1 if something would stop every run.
    """
    from lockstep.cli.doctor.show import show

    raise SystemExit(show(as_json, Console()))


def init(
    folder: Annotated[Path, typer.Argument(help="a new folder for the task", show_default=False)],
) -> None:
    """Write a task of your own to start from: a task file, a run's file and an AGENTS.md."""
    from lockstep.cli.init.write import write_task

    write_task(folder, Console())


def plan(
    model: Annotated[
        str, typer.Argument(help="a Hugging Face id or a folder; config.json is enough", show_default=False)
    ],
    gpus: Annotated[int, typer.Option(help="GPUs of all hosts", show_default=False)],
    context: Annotated[int, typer.Option(help="tokens of a sequence")] = 4096,
    sequences: Annotated[int, typer.Option(help="sequences that a step trains")] = 64,
    mode: Annotated[str, typer.Option(help="what travels to the servers: lora or merged")] = "lora",
    network: Annotated[float | None, typer.Option(help="GB/s between hosts", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="the kind of GPU")] = "h200",
    scale: Annotated[
        bool, typer.Option("--scale", help="the fastest layout of each power of two up to --gpus")
    ] = False,
) -> None:
    """Say what a model needs before GPUs are there: memory and time of a step and a sync, per layout,
    computed from counted work and measured limits, which are printed.
    """
    from lockstep.cli.plan.command import show_plan

    show_plan(model, gpus, context, sequences, mode, network, device, scale, Console())


def models() -> None:
    """List the supported model families: modes, adapter status and the evidence for each."""
    from rich.markup import escape
    from rich.padding import Padding

    from lockstep.models.registry import list_model_support_specs
    from lockstep.validate.evidence import summary_of, unbacked

    console = Console()
    for spec in list_model_support_specs():
        kind = "mixture of experts" if spec.is_moe else "dense"
        weights = f"weights as {spec.default_rollout_weights_mode}, adapters in vLLM {spec.native_vllm_lora_status}"
        text = f"{spec.key}: {kind}; {weights}; evidence: {summary_of(spec.key)} ({spec.evidence})"
        for line in (text, *(f"  {line}" for line in unbacked(spec))):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(Padding(escape(", ".join(spec.model_names)), (0, 0, 1, 2)), highlight=False)


COMMANDS = (report, view, watch, trace, export, serve, doctor, init, plan, models)
