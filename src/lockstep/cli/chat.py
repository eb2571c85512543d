"""Talk to a published step of a run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lockstep.errors import ServerError


def chat_with(run: Path, message: str | None, step: int | None, console: Console) -> None:
    """Serve the run's base model with a step's adapter; answer `message`, or read messages from the
    terminal until it ends.

    Not async: while an event loop runs, Ctrl-C at the prompt would only be noted.
    """
    from lockstep.backends.megatron import launch

    with asyncio.Runner() as runner:
        with console.status("starting the server") as status:
            server, name = runner.run(launch.serve_step(run, step, lambda line: status.update(Text(line))))
        messages: list[Any] = []
        try:
            while True:
                text = _read(console) if message is None else message
                if text is None:
                    return
                messages.append({"role": "user", "content": text})
                reply = runner.run(_answer(server.base_url, server.api_key, name, messages))
                console.print(f"{name}  {reply}", markup=False, highlight=False)
                if message is not None:
                    return
                messages.append({"role": "assistant", "content": reply})
        finally:
            runner.run(server.close())


def _read(console: Console) -> str | None:
    try:
        return console.input("[bold]you[/]  ")
    except (EOFError, KeyboardInterrupt):
        return None


async def _answer(base_url: str, api_key: str, name: str, messages: list[Any]) -> str:
    """The reply's text. Raises ServerError when there is none, or the server refuses (a
    conversation that got too long).
    """
    from openai import APIError

    from lockstep.backends.base import Endpoint
    from lockstep.model import open_client

    async with open_client(Endpoint(base_url, api_key)) as client:
        try:
            completion = await client.chat.completions.create(
                model=name, messages=messages, temperature=0.0, max_tokens=256
            )
        except APIError as error:
            raise ServerError(f"{name} did not answer: {' '.join(str(error).split())}") from None
    choice = completion.choices[0]
    if choice.message.content is None:
        raise ServerError(f"{name} answered without text (finish reason {choice.finish_reason})")
    return choice.message.content
