"""Serve a published step as an OpenAI endpoint until Ctrl-C."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lockstep.cli.export.choose import chosen_step


async def serve_run(run: Path, step: str | None, console: Console) -> None:
    """The address, key and name are printed once the server answers. It listens on loopback.

    Raises StoreError for a folder that is no run or a step that is not published, ServerError where
    the server ends by itself.
    """
    from lockstep.backends.megatron.launch import serve_step

    number = chosen_step(run.expanduser().resolve(), step)
    with console.status("starting the server") as status:
        server, name = await serve_step(run, number, lambda line: status.update(Text(line)))
    try:
        for line in (
            f"export OPENAI_BASE_URL={server.base_url}",
            f"export OPENAI_API_KEY={server.api_key}",
            f"model       {name}",
            "Ctrl-C ends it; other machines reach it through `ssh -L`",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        while not (problem := await server.problem()):
            await asyncio.sleep(2)
        console.print(f"the server ended: {problem}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1)
    finally:
        await server.close()
