"""A judging service of somebody else's, and attempts to judge."""

# pyright: reportArgumentType=false

from __future__ import annotations

import importlib
import json
import re

import openai
from openai.types.chat.chat_completion import Choice

import lockstep as ls

QUESTION = {"role": "user", "content": "Name a fruit."}


def attempt(text: str, tool: str | None = None) -> ls.Trajectory:
    def said(content, calls=None):
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        return Choice(index=0, finish_reason="stop", message=message)

    items = [QUESTION, said(text)]
    if tool is not None:
        call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        items = [QUESTION, said("", [call]), {"role": "tool", "tool_call_id": "c", "content": tool}, said(text)]
    return ls.Trajectory(messages_and_choices=items, reward=0.0)


class Server:
    """An OpenAI-compatible service of somebody else's. answer: what it says to the messages of a request."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []
        http = importlib.import_module(openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0])

        def reply(request):
            self.asked.append(json.loads(request.content)["messages"])
            message = {"role": "assistant", "content": self.answer(self.asked[-1])}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "j",
                "choices": [choice],
                "usage": usage,
            }
            return http.Response(200, json=body)

        transport = openai.DefaultAsyncHttpxClient(transport=http.MockTransport(reply))
        self.client = openai.AsyncOpenAI(base_url="http://judge/v1", api_key="k", http_client=transport, max_retries=0)


def by_length(messages) -> str:
    """A judge that likes long attempts."""
    shown = re.findall(r'<attempt number="\d+">\n(.*?)\n</attempt>', messages[1]["content"], re.DOTALL)
    return "So: " + json.dumps({"scores": [len(text) / 100 for text in shown]})
