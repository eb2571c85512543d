"""The command line. Every command is a few lines over a function of the library; errors a user can
fix print as one line.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from lockstep import __version__
from lockstep.cli.commands import COMMANDS
from lockstep.errors import ERROR, ConfigError, LockstepError
from lockstep.models.tiny.write import parse_override, tiny_models

app = typer.Typer(
    help="Reinforcement-learning post-training of LLM agents: the policy that is trained is the policy that was sampled.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
runtime_app = typer.Typer(help="The isolated vLLM environment that serves models.", no_args_is_help=True)
app.add_typer(runtime_app, name="runtime")

for command in COMMANDS:
    app.command()(command)

console = Console()

_INTERRUPTED = 130
_GO_ON = {
    "sft": "interrupted; published steps are safe, run the same command to go on",
    "train": "interrupted; published steps are safe, run the same command to go on",
    "quickstart": "interrupted; published steps are safe, add --no-fresh to go on",
}
_USERS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}
"""Errors of the file system that are no fault of the program."""
_TRAIN_EXTRA = ("torch", "transformers", "megatron", "einops", "jinja2", "huggingface_hub")


def _print_version(asked: bool) -> None:
    if asked:
        _say(f"lockstep {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """Reinforcement-learning post-training of LLM agents: the policy that is trained is the policy
    that was sampled.
    """


@app.command()
def quickstart(
    path: Annotated[Path, typer.Option(help="folder for the run and its tiny model")] = Path("runs/quickstart"),
    seed: Annotated[int, typer.Option(min=0, help="seed of the model, the data order and the sampling")] = 0,
    fresh: Annotated[bool, typer.Option(help="delete what an earlier quickstart left in the folder")] = True,
    real: Annotated[
        bool, typer.Option("--real", help="SmolLM2-135M-Instruct learns arithmetic instead; a download of 93 MB")
    ] = False,
) -> None:
    """Make a tiny Qwen3 and train it with GRPO until its answers earn 0.9. Needs no GPU and no
    download; about a minute.

    With --real: a real model, until its greedy reward on 64 held-out questions has risen by 0.15;
    some minutes.
    """
    from lockstep.cli.quickstart.tiny import run_quickstart

    raise SystemExit(asyncio.run(run_quickstart(path, seed, fresh, console, real)))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="the run's TOML file", show_default=False)],
    tiny: Annotated[
        bool, typer.Option("--tiny", help="train a tiny model made here instead of the base model; needs no GPU")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show every setting with its reason, check them all, and start nothing")
    ] = False,
) -> None:
    """Train a model on your own task: a TOML file and a short Python file with the rollout and the
    reward.

    Run it again to go on from the last published step. Exits with 3 if the run ends below its
    stop_at_reward.
    """
    from lockstep.cli.train import run_file

    raise SystemExit(asyncio.run(run_file(config, tiny, console, dry_run)))


@app.command()
def sft(
    config: Annotated[Path, typer.Argument(help="the run's TOML file, with [sft]", show_default=False)],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="check every row of the data and every setting, show them, and start nothing"),
    ] = False,
) -> None:
    """Train a model on a file of chats, with loss on the assistant's turns. `lockstep train` with the
    same file goes on from there.

    Run it again to go on from the last published step, also inside an epoch.
    """
    from lockstep.cli.sft import sft_file

    raise SystemExit(asyncio.run(sft_file(config, console, dry_run)))


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(help="folder of a run: PATH/PROJECT/NAME", show_default=False)],
    message: Annotated[str | None, typer.Option("--message", "-m", help="say this, print the reply, and leave")] = None,
    step: Annotated[int | None, typer.Option(help="which published step; the last one if not given")] = None,
) -> None:
    """Talk to a trained model: starts its server, loads the step's adapter, and reads from the
    terminal.
    """
    from lockstep.cli.chat import chat_with

    chat_with(run, message, step, console)


@app.command()
def steps(
    run: Annotated[Path, typer.Argument(help="folder of a run: PATH/PROJECT/NAME", show_default=False)],
    delete: Annotated[
        list[int] | None, typer.Option("--delete", help="delete this step; its metrics and manifest stay (repeatable)")
    ] = None,
) -> None:
    """List a run's published steps and why each is kept; --delete removes some of a run that is not
    in use.
    """
    from lockstep.cli.steps import delete_steps, show_steps

    if delete:
        delete_steps(run, delete, console)
    show_steps(run, console)


@app.command()
def fork(
    run: Annotated[Path, typer.Argument(help="folder of a run: PATH/PROJECT/NAME", show_default=False)],
    step: Annotated[int, typer.Argument(help="a published step", show_default=False)],
    name: Annotated[str, typer.Argument(help="of the new run, beside the other", show_default=False)],
) -> None:
    """Begin a new run at a published step of another, with its optimizer's state; set its name in the
    run's file to go on.
    """
    from lockstep.runs.fork import fork as forked

    _say(f"{forked(run, step, name)} goes on from step {step}: set [model] name = {name!r}")


@app.command()
def jobs(run: Annotated[Path, typer.Argument(help="folder of a run: PATH/PROJECT/NAME", show_default=False)]) -> None:
    """List what a run asked of its trainer and server: steps and syncs, under way, done or failed."""
    from lockstep.cli.steps import show_jobs

    show_jobs(run, console)


@app.command()
def score(
    model: Annotated[str, typer.Argument(help="a checkpoint folder or a Hugging Face id", show_default=False)],
    input: Annotated[Path, typer.Option(help='JSON lines: {"id": "a", "tokens": [1, 2, 3], "routed_experts": null}')],  # noqa: A002
    output: Annotated[Path, typer.Option(help='JSON lines: {"id": "a", "logprobs": [-1.2, -0.4]}')],
    adapter: Annotated[Path | None, typer.Option(help="a PEFT adapter folder")] = None,
    tp: Annotated[int, typer.Option(min=1, help="tensor parallel size")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="pipeline parallel size")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="expert parallel size")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="context parallel size")] = 1,
    sp: Annotated[bool, typer.Option("--sp", help="sequence parallel between tensor parallel layers")] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="pack into prefix trees first; values stay the same")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the checkpoint's if not given")] = None,
) -> None:
    """Score token sequences with the training engine: one log-probability per token after the
    first.
    """
    from lockstep.cli.score import read_lines, write_lines
    from lockstep.cli.score import score as score_lines
    from lockstep.config.megatron import Parallel

    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype}: it is float32 or bfloat16")
    if not output.parent.is_dir() or output.is_dir():
        raise ConfigError(f"--output {output}: give a file in a folder that exists")
    # Experts split the ranks that tensor, context and data parallelism span, so what the first two
    # leave open is data parallel.
    data = math.lcm(ep, tp * cp) // (tp * cp)
    parallel = Parallel(tensor=tp, pipeline=pp, expert=ep, context=cp, data=data, sequence=sp)
    lines = read_lines(input)
    with console.status(f"scoring {len(lines)} sequences on {parallel.processes} processes"):
        scored = asyncio.run(score_lines(model, lines, adapter=adapter, parallel=parallel, packed=packed, dtype=dtype))
    write_lines(output, scored)
    _say(f"{output}: {len(scored)} sequences, {sum(len(scores.logprobs) for scores in scored)} log-probabilities")


@app.command()
def validate(
    model: Annotated[
        str,
        typer.Argument(
            help="a checkpoint folder, a Hugging Face id, a GGUF file, a family's key (then a tiny model is made), or a "
            "run's folder",
            show_default=False,
        ),
    ],
    stages: Annotated[str, typer.Option(help="the stages to run, separated by commas; all if not given")] = "",
    skip: Annotated[str, typer.Option(help="stages to leave out, separated by commas")] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; what this machine has if not given")] = None,
    parallel: Annotated[
        str, typer.Option(help="the layout that correctness tries, as tp=2,ep=2; its own list if not given")
    ] = "",
    layers: Annotated[str, typer.Option(help="all, or minimal: the fewest leading layers with every kind")] = "all",
    report: Annotated[Path, typer.Option(help="folder for report.json and report.html")] = Path("validation"),
    seed: Annotated[int, typer.Option(min=0, help="seed of all random inputs and of the sampling")] = 0,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="sequences to sample, per policy; 16, or 8 on a CPU, if not given")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens to sample per sequence; 64, or 32 on a CPU, if not given")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, of the stages with a server; the checkpoint's if not given")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="end after the first stage that fails")] = False,
    evidence: Annotated[
        Path | None, typer.Option(help="folder in which the family's file keeps this report's short form")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="stages that run at a time")] = 1,
    server_arg: Annotated[
        list[str] | None, typer.Option(help="a further argument for vLLM, as --server-arg=--enforce-eager; repeatable")
    ] = None,
) -> None:
    """Check a model on this machine, stage by stage, each in a process of its own.

    Of a run the last step is checked, served with the settings and in the dtype of the run.
    Exits with 1 unless every selected stage passed.
    """
    from lockstep.validate import command

    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype}: it is float32 or bfloat16")
    if report.is_file():
        raise ConfigError(f"--report {report} is a file: give a folder")
    chosen, skipped = ([name.strip() for name in text.split(",") if name.strip()] for text in (stages, skip))
    sizes = command.parse_parallel(parallel)
    options = command.Options(
        chosen, skipped, device, sizes, layers, report, seed, prompts, tokens, dtype, stop, evidence, jobs,
        server_arg or (),
    )  # fmt: skip
    raise SystemExit(command.validate(model, options, console))


@app.command()
def tiny(
    family: Annotated[str, typer.Argument(help=f"one of {', '.join(tiny_models())}", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="where to write the checkpoint", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="seed of the weights")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a field of the model's config")
    ] = None,
) -> None:
    """Write a small Hugging Face checkpoint with random weights, a tokenizer and a chat template."""
    from lockstep.models.tiny.write import write_tiny

    write_tiny(family, folder, seed=seed, overrides=dict(map(parse_override, settings or [])))
    size = sum(file.stat().st_size for file in folder.iterdir())
    _say(f"{folder}: {family}, {size / 1e6:.1f} MB")


@app.command("import-gguf")
def import_gguf_command(
    file: Annotated[Path, typer.Argument(help="a GGUF file", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="where to write the checkpoint", show_default=False)],
    dtype: Annotated[str, typer.Option(help="of the weights that are written: bfloat16 or float32")] = "bfloat16",
) -> None:
    """Turn a GGUF file of a supported architecture into a Hugging Face checkpoint, weights
    dequantized.
    """
    from lockstep.models.gguf.convert import import_gguf

    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype}: it is float32 or bfloat16")
    import_gguf(file, folder, dtype, _say)
    size = sum(path.stat().st_size for path in folder.iterdir())
    _say(f"{folder}: {size / 1e6:.0f} MB, {dtype}")


@runtime_app.command("install")
def runtime_install(
    kind: Annotated[str | None, typer.Option(help="cpu or cuda; what this machine has if not given")] = None,
    wheels: Annotated[
        Path | None,
        typer.Option(help="take all packages from this folder of wheels, and ask no index", show_default=False),
    ] = None,
) -> None:
    """Build the server's environment from its lock file. Continues where an interrupted install
    stopped.
    """
    from lockstep.inference.environment.install import install

    if kind not in (None, "cpu", "cuda"):
        raise ConfigError(f"--kind {kind}: it is cpu or cuda")
    if wheels is not None:
        if not any(wheels.glob("*.whl")):
            raise ConfigError(f"--wheels {wheels}: no wheel is in there")
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels.resolve())}
    runtime = install(kind, progress=_say)
    _say(f"runtime {runtime.kind} is ready: {runtime.python}")


@runtime_app.command("download")
def runtime_download(
    folder: Annotated[Path, typer.Argument(help="a folder for the wheels", show_default=False)],
    kind: Annotated[str | None, typer.Option(help="cpu or cuda; what this machine has if not given")] = None,
) -> None:
    """Fill a folder with the wheels of the server's environment, for a machine without a network that
    has the same Python: there `lockstep runtime install --wheels FOLDER`.
    """
    from lockstep.inference.environment.install import download

    _say(f"{folder}: {download(folder, kind, _say) / 1e9:.2f} GB of wheels")


@runtime_app.command("status")
def runtime_status() -> None:
    """Show which server environments exist, their sizes, and which one is used."""
    from lockstep.inference.environment.locate import status

    installed = status()
    for entry in installed:
        state = (
            ("current" if entry.current else "kept") if entry.complete else "incomplete: run lockstep runtime install"
        )
        python = f", Python {entry.python_version}" if entry.python_version else ""
        _say(f"{entry.kind}: {state}, {entry.size_bytes / 1e9:.2f} GB{python}, {entry.folder}")
    if not installed:
        _say("no server environment yet: run lockstep runtime install")


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: user errors become one line on stderr and the error's exit code."""
    try:
        app()
    except LockstepError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in _USERS:
            raise
        _fail(f"{error.filename or 'a file'}: {error.strerror}", 1)
    except ModuleNotFoundError as error:
        if error.name not in _TRAIN_EXTRA:
            raise
        _fail(f"this command needs {error.name}: pip install lockstep-rl[train]", 1)
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # typer's answer to Ctrl-C
            Console(stderr=True).print(_GO_ON.get(sys.argv[1], "interrupted"), soft_wrap=True)
        raise


def _fail(text: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"[bold red]{ERROR}[/]{escape(text)}", soft_wrap=True, highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
