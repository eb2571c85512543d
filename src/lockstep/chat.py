"""Talk to a published step of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lockstep.errors import ServerError


async def chat_with(run: Path, message: str | None, step: int | None, console: Console) -> None:
    """Serve the run's base model with a step's adapter; answer `message`, or read messages from the terminal until it ends."""
    from openai import AsyncOpenAI

    from lockstep.backends.start import serve_step

    with console.status("starting the server") as status:
        server, name = await serve_step(run, step, status.update)
    client = AsyncOpenAI(base_url=server.base_url, api_key=server.api_key)
    messages: list[Any] = []
    try:
        while True:
            if message is None:
                try:
                    text = console.input("[bold]you[/]  ")
                except (EOFError, KeyboardInterrupt):
                    return
            else:
                text = message
            messages.append({"role": "user", "content": text})
            completion = await client.chat.completions.create(
                model=name, messages=messages, temperature=0.0, max_tokens=256
            )
            reply = completion.choices[0].message.content
            if reply is None:
                raise ServerError(f"{name} answered without text (finish reason {completion.choices[0].finish_reason})")
            console.print(f"{name}  {reply}", markup=False, highlight=False)
            if message is not None:
                return
            messages.append({"role": "assistant", "content": reply})
    finally:
        await server.close()
