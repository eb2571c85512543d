"""An agent as small as can be: the model, and a shell as its one tool."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.gateway.episode import Episode
    from lockstep.loop.environments.sandbox import Sandbox

_SYSTEM = "You work in a Linux shell. Do what you are asked with the tool `bash`. When all is done, say so without a tool call."
_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command and see what it prints. Files stay, processes do not.",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string"}},
            "required": ["command"],
        },
    },
}
_SHOWN = 8000
"""Characters of a command's output that the model sees."""


class ShellAgent:
    """turns: replies at most. reply_tokens: of each. command_s: seconds of a command."""

    def __init__(self, episode: Episode, sandbox: Sandbox, turns: int, reply_tokens: int, command_s: float):
        self._episode, self._sandbox = episode, sandbox
        self._turns, self._reply_tokens, self._command_s = turns, reply_tokens, command_s

    async def work(self, instruction: str, limit_s: float) -> None:
        """Until the model calls no tool, its turns or its context end, or the time is over."""
        try:
            async with asyncio.timeout(limit_s):
                await self._loop(instruction)
        except TimeoutError:
            return

    async def _loop(self, instruction: str) -> None:
        from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient

        messages: list[Any] = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": instruction}]
        episode, direct = self._episode, DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncOpenAI(base_url=episode.base_url, api_key=episode.api_key, http_client=direct) as client:
            for turn in range(self._turns):
                try:
                    reply = await client.chat.completions.create(
                        model=episode.model, messages=messages, tools=[_TOOL], max_tokens=self._reply_tokens
                    )
                except BadRequestError:
                    if turn == 0:
                        raise
                    return  # the context is full: what was done is judged
                message = reply.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                if not message.tool_calls:
                    return
                messages += [await self._called(call) for call in message.tool_calls]

    async def _called(self, call: Any) -> dict[str, Any]:
        try:
            command = json.loads(call.function.arguments)["command"]
            text = await self._ran(str(command)) if call.function.name == "bash" else f"no tool {call.function.name!r}"
        except (ValueError, KeyError, TypeError):
            text = 'the arguments must be {"command": "..."}'
        return {"role": "tool", "tool_call_id": call.id, "content": text}

    async def _ran(self, command: str) -> str:
        done = await self._sandbox.run(command, {}, self._command_s)
        text = done.output
        if len(text) > _SHOWN:
            text = f"{text[: _SHOWN // 2]}\n[...]\n{text[-_SHOWN // 2 :]}"
        if done.code is None:
            return f"{text}\n[stopped after {self._command_s:g} s]"
        return text if done.code == 0 else f"{text}\n[exit code {done.code}]"
